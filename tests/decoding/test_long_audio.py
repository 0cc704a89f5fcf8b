import math
import random
import sys

import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding import long_audio
from rwkv_speech.decoding.long_audio import PAD, PAUSE, Piece, Segmenter, SpeechBounds, cut
from rwkv_speech.decoding.vad import BLOCK, Vad
from rwkv_speech.synthetic.corpus import sentence
from rwkv_speech.synthetic.espeak import Synthesizer, Voice

RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> Tensor:
    """A minute: sentences, each with its pause, one of two seconds and many of less than PAUSE; one lone click."""
    synthesizer, rng = Synthesizer(), random.Random(0)
    pauses = [0.5, 0.1, 0.15, 0.2, 0.1, 0.3, 2.0, 0.25, 0.15, 0.05, 0.1, 1.0, 0.4, 0.1, 0.15, 0.6, 0.1, 0.2]
    parts = [torch.zeros(RATE)]
    for pause in pauses:
        parts += [synthesizer.say(sentence(rng), Voice("en-us")).waveform(), torch.zeros(round(RATE * pause))]
    waveform = torch.cat(parts)
    return waveform + 1e-3 * torch.randn(len(waveform), generator=torch.Generator().manual_seed(0))


def pieces_of(waveform: Tensor, segmenter: Segmenter, sizes: list[int] | int = RATE) -> list[Piece]:
    return list(cut(waveform.split(sizes), segmenter))


def same(a: list[Piece], b: list[Piece]) -> bool:
    return [x.start for x in a] == [x.start for x in b] and all(
        torch.equal(x.waveform, y.waveform) for x, y in zip(a, b, strict=True)
    )


def test_pieces_are_the_speech_that_the_package_finds(speech: Tensor):
    from silero_vad import get_speech_timestamps_from_probs

    vad = Vad()
    probabilities = torch.cat([vad.block(block) for block in speech.split(BLOCK)]).tolist()
    expected = get_speech_timestamps_from_probs(
        probabilities,
        min_speech_duration_ms=160,
        min_silence_duration_ms=PAUSE * 1000 // RATE,
        speech_pad_ms=PAD * 1000 // RATE,
        audio_length_samples=len(speech),
    )
    segmenter = Segmenter(3600.0)
    pieces = pieces_of(speech, segmenter)
    assert len(pieces) > 4
    # In steps of 80 ms.
    assert [(p.start, p.end) for p in pieces[:-1]] == [
        (x["start"], x["start"] + math.ceil((x["end"] - x["start"]) / 1280) * 1280) for x in expected[:-1]
    ]
    assert (pieces[-1].start, pieces[-1].end) == (expected[-1]["start"], expected[-1]["end"])  # where the audio ends
    assert all(torch.equal(p.waveform, speech[p.start : p.end]) for p in pieces)
    assert segmenter.removed_samples == len(speech) - sum(len(p.waveform) for p in pieces)


def chunkings(samples: int, count: int) -> list[list[int]]:
    """Of so many samples: parts of 20 ms to 5 s, each chunking with a scale of its own."""
    rng, found = random.Random(1), []
    for _ in range(count):
        longest, sizes = round(RATE * 0.02 * 250 ** rng.random()), list[int]()
        while (left := samples - sum(sizes)) > 0:
            sizes.append(min(left, rng.randint(RATE // 50, max(longest, RATE // 50))))
        found.append(sizes)
    return found


class RecordedVad(Vad):
    """What the real one said of these blocks, to which it must be given again, to the bit."""

    def __init__(self, waveform: Tensor) -> None:
        super().__init__()
        self._known = [(block, Vad.block(self, block)) for block in waveform.split(BLOCK)]
        self._next = 0

    def block(self, samples: Tensor) -> Tensor:
        known, probabilities = self._known[self._next]
        self._next = (self._next + 1) % len(self._known)
        assert torch.equal(samples, known)
        return probabilities


def word_gaps(audio: Tensor) -> list[int]:
    """No words at all, but places that depend on every sample."""
    return [int(audio.abs().argmax()), len(audio) - 1 - int(audio.abs().argmin())]


SETTINGS = [(100.0, "silero", None), (2.5, "silero", None), (2.5, "silero", word_gaps), (2.5, "none", None)]


def test_any_chunking_gives_the_same_pieces(speech: Tensor, monkeypatch: pytest.MonkeyPatch):
    part = speech[: 7 * RATE + 123]
    whole = [Segmenter(*setting) for setting in SETTINGS]
    expected = [[*segmenter.push(part), *segmenter.finish()] for segmenter in whole]
    assert len({tuple(piece.start for piece in pieces) for pieces in expected}) == len(SETTINGS)
    recorded = RecordedVad(part)
    for number, sizes in enumerate(chunkings(len(part), 1_000)):
        if number == 8:
            monkeypatch.setattr(long_audio, "Vad", lambda: recorded)
        segmenter = Segmenter(*SETTINGS[number % 4])
        assert same(pieces_of(part, segmenter, sizes), expected[number % 4]), sizes
        assert segmenter.removed_samples == whole[number % 4].removed_samples


@pytest.mark.parametrize("vad", ["silero", "none"])
@pytest.mark.parametrize("seconds", [1.0, 1.7, 4.0])
def test_a_piece_that_would_be_too_long_is_cut_without_a_loss(speech: Tensor, vad: str, seconds: float):
    free = pieces_of(speech, Segmenter(3600.0, vad))
    pieces = pieces_of(speech, Segmenter(seconds, vad))
    assert len(pieces) > len(free) and max(len(piece.waveform) for piece in pieces) <= seconds * RATE
    for piece in free:
        inside = [x for x in pieces if piece.start <= x.start < piece.end]
        end = inside[-1].end
        assert inside[0].start == piece.start
        assert torch.equal(torch.cat([x.waveform for x in inside]), speech[piece.start : end])
        # A cut may fall into the pause behind it, too.
        assert abs(piece.end - end) < PAUSE and speech[min(piece.end, end) : piece.end].abs().sum() < 10


def spoken(words: str, pauses: list[float]) -> tuple[Tensor, list[int]]:
    """Vowels of the given seconds, parted by pauses; the middle of each pause."""
    parts, middles = [], []
    for seconds, pause in zip(map(float, words.split()), pauses, strict=True):
        time = torch.arange(round(RATE * seconds)) / RATE
        parts += [0.3 * torch.sin(2 * torch.pi * 150 * time), torch.zeros(round(RATE * pause))]
        middles.append(sum(map(len, parts)) - round(RATE * pause / 2))
    return torch.cat(parts), middles


def test_the_cut_is_in_the_longest_pause_of_the_second_half_then_between_words_then_where_it_is_quietest():
    audio, middles = spoken("0.5 1.2 0.6 0.8 2.0", [0.25, 0.12, 0.2, 0.15, 0.0])
    assert len(audio) < 6 * RATE

    def first_cut(gaps=None, waveform: Tensor = audio) -> int:
        return pieces_of(waveform, Segmenter(4.0, "none", gaps))[0].end

    assert abs(first_cut() - middles[2]) < 600
    assert first_cut(lambda waveform: [100]) == first_cut()
    # Without a pause.
    tone = audio[:5_000].repeat(20)
    tone[50_000:51_500] *= 0.5
    assert abs(first_cut(None, tone) - 50_750) < 600
    assert first_cut(lambda waveform: [20_000, 40_000, 45_000, 10**6], tone) == 45_000
    assert abs(first_cut(lambda waveform: [20_000], tone) - 50_750) < 600


def test_silence_is_cut_without_a_search_for_words():
    def asked(waveform: Tensor) -> list[int]:
        raise AssertionError("words were looked for")

    pieces = pieces_of(torch.zeros(30 * RATE), Segmenter(4.0, "none", asked))
    assert sum(len(piece.waveform) for piece in pieces) == 30 * RATE and len(pieces) <= 15


def test_a_question_is_one_piece_without_the_silence_around_it(speech: Tensor):
    question = torch.cat([speech, torch.zeros(40 * RATE)])
    whole = SpeechBounds(pause=sys.maxsize)
    [piece] = pieces_of(question, Segmenter(3600.0, bounds=whole))
    pieces = pieces_of(question, Segmenter(3600.0))
    assert len(pieces) > 4 and piece.start == pieces[0].start and abs(piece.end - pieces[-1].end) < RATE / 10
    # One that nobody ends is ended by the silence behind it, at the longest that a piece may be.
    most = (len(speech) + 20 * RATE) / RATE
    [ended] = pieces_of(question, Segmenter(most, bounds=whole))
    assert ended.start == piece.start and abs(ended.end - piece.end) < RATE / 10


def test_memory_does_not_grow_with_the_recording(speech: Tensor):
    for vad in ("silero", "none"):
        segmenter, held = Segmenter(5.0, vad), []
        for _ in range(2):
            for chunk in [*speech.split(RATE), torch.zeros(20 * RATE)]:
                segmenter.push(chunk)
                open_piece = segmenter.open_piece
                held.append(sum(len(x) for x in vars(segmenter)["_blocks"]))
                assert open_piece is None or len(open_piece.waveform) <= 5 * RATE
        assert max(held) <= 5 * RATE + 2 * BLOCK


def test_silence_shorter_than_a_pause_stays_and_no_speech_gives_no_piece(speech: Tensor):
    pieces = pieces_of(speech, Segmenter(30.0))
    sentence = pieces[0].waveform
    short = torch.zeros(PAUSE // 2)
    segmenter = Segmenter(30.0)
    (only,) = pieces_of(torch.cat([short, sentence, short]), segmenter)
    assert only.start == 0 and len(only.waveform) == len(sentence) + 2 * len(short) and segmenter.removed_samples == 0
    for nothing in (torch.zeros(5 * RATE), torch.zeros(100), torch.zeros(0)):
        segmenter = Segmenter(30.0)
        assert pieces_of(nothing, segmenter) == [] and segmenter.removed_samples == len(nothing)


def test_a_piece_begins_and_ends_with_its_sound_where_silence_is_left_out(speech: Tensor):
    sentence = next(x.waveform for x in pieces_of(speech, Segmenter(30.0)) if len(x.waveform) > 2 * RATE)
    sentence = sentence * (sentence.abs() > 0.01)
    loud = sentence.nonzero()
    sentence = sentence[int(loud[0]) : int(loud[-1]) + 1]
    for silence in (torch.zeros(RATE), 1e-5 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))):
        found = pieces_of(torch.cat([silence, sentence] * 3 + [silence]), Segmenter(30.0))
        assert len(found) == 3
        for number, piece in enumerate(found):
            begin = RATE + number * (RATE + len(sentence))
            assert 0 <= begin - piece.start < 500 and 0 <= piece.end - begin - len(sentence) < 500 + 1280
