"""Readings of a growing piece on random weights, against reading everything again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding import forks
from rwkv_speech.decoding.forks import Forks, OpenPiece, Reading
from rwkv_speech.decoding.long_audio import Piece
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.strategy import Strategy
from rwkv_speech.decoding.transcribe import SpeechLM

OPTIONS = Options.given(0.0, max_new_tokens=8, initial_prompt="the weather", prompt=" is")


@pytest.fixture(scope="module", params=["x060", "x070"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def audio() -> Tensor:
    noise = torch.randn(8 * SAMPLE_RATE + 1, generator=torch.Generator().manual_seed(6))
    # Its colour changes, so that its parts differ to the encoder.
    return 0.1 * (noise[1:] + torch.linspace(-1, 1, len(noise) - 1) * noise[:-1])


def open_piece(model: SpeechLM) -> OpenPiece:
    return OpenPiece(model, "asr", OPTIONS, Strategy(OPTIONS, model.tokenizer.eos_id))


@torch.no_grad()
def oracle(model: SpeechLM, audio_tokens: Tensor, committed: str) -> tuple[list[int], list[float]]:
    """The text, and the log-probability of each of its tokens, from all that stands before it."""
    encode = model.tokenizer.encode
    ids = encode(committed)
    limit = max(len(ids), 8)
    logprobs = list[float]()
    for place in range(limit + 1):
        embed = [model.lm.embed(torch.tensor(x)) for x in (encode("the weather"), [*encode(" is"), model.separator_id])]
        text = model.lm.embed(torch.tensor(ids[:place], dtype=torch.int64))
        x = torch.cat([embed[0], audio_tokens, embed[1], text])[None]
        row = model.lm(inputs_embeds=x, state=model.initial_state(["asr"])).logits[0, -1].log_softmax(-1)
        if place >= len(ids):
            if place == limit or int(row.argmax()) == model.tokenizer.eos_id:
                break
            ids.append(int(row.argmax()))
        logprobs.append(float(row[ids[place]]))
    return ids, logprobs


def tokens(model: SpeechLM, waveform: Tensor) -> Tensor:
    sample = Sample("", waveform, "", [], len(waveform) / SAMPLE_RATE, 0, "asr")
    return model.audio_tokens(collate([sample]))[0]


def same(model: SpeechLM, reading: Reading, expected: tuple[list[int], list[float]], committed: str = "") -> bool:
    ids, logprobs = expected
    found = reading.hypothesis
    assert list(found.logprobs[: len(logprobs)]) == pytest.approx(logprobs, abs=1e-3)
    return list(found.ids) == ids and reading.text == model.tokenizer.decode(ids)


def test_one_reading_is_that_of_all_the_audio(model: SpeechLM, audio: Tensor):
    texts = set()
    for size in (4_000, 16_000, 48_000):
        reading = open_piece(model).read(Piece(0, audio[:size]))
        assert same(model, reading, oracle(model, tokens(model, audio[:size]), ""))
        texts.add(reading.text)
    assert len(texts) > 1  # else the audio would not matter


def test_committed_text_comes_first_and_the_rest_follows_it(model: SpeechLM, audio: Tensor):
    for committed in ("the", "the weather is good", "z"):
        reading = open_piece(model).read(Piece(0, audio[:20_000]), committed)
        ids, logprobs = oracle(model, tokens(model, audio[:20_000]), committed)
        assert reading.text.startswith(committed)
        assert list(reading.hypothesis.ids) == ids
        assert list(reading.hypothesis.logprobs[: len(logprobs)]) == pytest.approx(logprobs, abs=1e-3)


def test_letters_that_would_make_another_word_of_the_committed_one_are_left_out():
    assert forks._apart("ty six", "nine") == " six"
    assert forks._apart(", six", "nine") == ", six" and forks._apart(" six", "nine") == " six"
    assert forks._apart("れ", "晴") == "れ" and forks._apart("ty", "") == "ty" and forks._apart("", "nine") == ""


def test_a_growing_piece_keeps_what_is_settled_and_reads_the_rest_again(model: SpeechLM, audio: Tensor):
    piece, stack = open_piece(model), model.adapter.stack
    settled = tokens(model, audio[:1])[:0]
    texts = []
    for size in range(4_096, len(audio), 8 * 4_096):
        whole = tokens(model, audio[:size])
        reading = piece.read(Piece(0, audio[:size]))
        # The oracle's own account: tokens that lie a second back stay as they were then.
        settled = torch.cat([settled, whole[len(settled) : max(len(settled), len(whole) - 50 // stack)]])
        assert same(model, reading, oracle(model, torch.cat([settled, whole[len(settled) :]]), ""))
        # A copy was read: another one says the same.
        assert piece.read(Piece(0, audio[:size])).hypothesis == reading.hypothesis
        texts.append(reading.text)
    assert len(settled) > 100 and len(set(texts)) > 1


def test_a_reading_costs_the_same_however_long_the_piece_is(
    model: SpeechLM, audio: Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forks, "LOOK_BACK_SECONDS", 1.0)
    lengths, forward = list[int](), model.encoder.forward

    def counted(waveforms: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        lengths.append(waveforms.shape[1])
        return forward(waveforms, *args, **kwargs)

    monkeypatch.setattr(model.encoder, "forward", counted)
    piece = open_piece(model)
    for size in range(4_096, len(audio), 4_096):
        piece.read(Piece(0, audio[:size]))
    assert max(lengths) < 2.3 * SAMPLE_RATE and lengths[-1] == pytest.approx(lengths[len(lengths) // 2], abs=700)


def test_audio_of_no_token_says_nothing(model: SpeechLM):
    piece = open_piece(model)
    assert piece.read(Piece(0, torch.zeros(300))).text == ""
    assert piece.read(Piece(0, torch.zeros(300)), "the").text == "the"


def test_forks_begin_again_with_each_piece_and_read_a_complete_one_at_once(model: SpeechLM, audio: Tensor):
    forks = Forks(model, "asr", OPTIONS)
    for size in (4_096, 40_000, 60_000):
        found = forks.read(Piece(0, audio[:size]))
    alone = open_piece(model)
    for size in (4_096, 40_000, 60_000):
        expected = alone.read(Piece(0, audio[:size]))
    assert found.text == expected.text
    other = Piece(7, audio[60_000:90_000])
    assert forks.read(other).text == open_piece(model).read(other).text
    whole = forks.read_whole(Piece(7, audio[60_000:110_000]), "the")
    assert list(whole.hypothesis.ids) == oracle(model, tokens(model, audio[60_000:110_000]), "the")[0]


def test_keywords_are_heard_in_readings(model: SpeechLM, audio: Tensor):
    piece = Piece(0, audio[:20_000])
    plain = Forks(model, "asr", Options.given(0.0, max_new_tokens=8)).read(piece)
    listed = Options.given(0.0, max_new_tokens=8, keywords=["zebra"], keyword_weight=20.0)
    assert "zebra" in Forks(model, "asr", listed).read(piece).text.lower() and "zebra" not in plain.text.lower()
