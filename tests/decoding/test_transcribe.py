"""The road from audio to text, on random weights: batches, files, arrays, limits, notes."""

import io
import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from sounds import samples, sounds
from torch import Tensor

from decoding.test_coverage import LABELS, SENTENCES, ctc_of, loud_where
from rwkv_speech.audio import AudioError
from rwkv_speech.batch import BadSample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.coverage import halves
from rwkv_speech.decoding.engine import Done, Request
from rwkv_speech.decoding.long_audio import Piece
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Row, read_rows, write_rows
from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.decoding.transcribe import SpeechLM, transcribe, transcribe_batch, transcribe_batches
from rwkv_speech.decoding.transcriber import Recording, Transcriber
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcSpec
from rwkv_speech.models.parts import Parts, TrainedOn

# Of noise nothing else would be left.
ONCE = {"temperature": 0.0, "vad": "none"}
LENGTHS = [3_000, 0, 6_000, 399, 1_450, 5_555, 2_000]


@pytest.fixture(scope="module")
def waves() -> list[Tensor]:
    return sounds(LENGTHS)


def test_transcribe_equals_reading_the_whole_prefix_again(model: SpeechLM, waves: list[Tensor]):
    found = model.transcribe(waves, max_new_tokens=6, **ONCE)
    for wave, transcript in zip(waves, found, strict=True):
        audio, _ = model.audio_tokens(collate(samples([wave])))
        for length in range(len(transcript.ids)):
            prefix = model.lm.emb(torch.tensor([model.separator_id, *transcript.ids[:length]]))
            output = model.lm(inputs_embeds=torch.cat((audio, prefix))[None], state=model.initial_state(["asr"]))
            assert int(output.logits[0, -1].argmax()) == transcript.ids[length]


def test_transcribe_of_a_batch_equals_each_alone_in_order(model: SpeechLM, waves: list[Tensor]):
    together = model.transcribe(waves, batch_size=3, max_new_tokens=8, **ONCE)
    assert together == [model.transcribe(wave, batch_size=3, max_new_tokens=8, **ONCE)[0] for wave in waves]
    many = model.transcribe(waves, batch_size=100, max_new_tokens=8, **ONCE)
    assert [transcript.ids for transcript in together] == [transcript.ids for transcript in many]
    assert [transcript.seconds for transcript in together] == [len(wave) / 16_000 for wave in waves]
    assert all(transcript.text == model.tokenizer.decode(transcript.ids) for transcript in together)
    assert len({tuple(transcript.ids) for transcript in together}) > 2  # else order would not show


def test_transcribe_keeps_the_order_of_more_than_it_reads_ahead(model: SpeechLM, waves: list[Tensor]):
    limits = {"batch_size": 2, "max_new_tokens": 4, **ONCE}
    assert model.transcribe(waves * 3, **limits) == 3 * model.transcribe(waves, **limits)


def test_transcribe_of_nothing(model: SpeechLM):
    assert model.transcribe([]) == [] and transcribe_batch(model, collate([])) == []
    [silent] = model.transcribe([torch.zeros(0)])
    assert (silent.text, silent.segments, silent.seconds) == ("", [], 0)


def test_transcribe_takes_files_bytes_arrays_and_tensors_alone_or_in_a_list(
    model: SpeechLM, waves: list[Tensor], tmp_path: Path
):
    def transcribed(audio):
        return model.transcribe(audio, **ONCE)

    path = tmp_path / "a.wav"
    soundfile.write(path, waves[0].numpy(), 16_000, subtype="FLOAT")
    double = waves[0].double()
    forms = [path, str(path), path.read_bytes(), waves[0], waves[0].numpy(), double, double.numpy(), waves[0].half()]
    expected = transcribed([waves[0]])
    assert [transcribed(form) for form in forms[:-1]] == [expected] * 7
    assert transcribed(forms[:-1]) == expected * 7 and len(transcribed((path, waves[1]))) == 2
    assert transcribed(forms[-1])[0].seconds == expected[0].seconds
    assert transcribed(form for form in forms[:2]) == expected * 2
    assert transcribed(waves[0].numpy().astype(">f4")) == transcribed(waves[0].clone().requires_grad_()) == expected
    fixed = (waves[0] * 2**15).round().to(torch.int16)
    assert transcribed(fixed) == transcribed(fixed.numpy()) == transcribed(fixed.double() / 2**15)


def test_a_piece_in_which_the_ctc_head_hears_nothing_has_no_text(
    model: SpeechLM, waves: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    longest = max(len(wave) for wave in waves)

    class Head:
        """Hears labels all over in the longest sound alone."""

        spec = CtcSpec("a")

        def __call__(self, frames: Tensor, lengths: Tensor) -> Tensor:
            heard = 0.6 if frames.shape[1] == 18 else 1e-3
            return torch.tensor([1 - heard, heard]).log().expand(1, frames.shape[1], 2)

    before = model.transcribe(waves, max_new_tokens=4, **ONCE)
    monkeypatch.setattr(model, "ctc", Head())
    found = model.transcribe(waves, max_new_tokens=4, **ONCE)
    kept = model.transcribe(waves, max_new_tokens=4, no_speech_threshold=1.0, **ONCE)
    assert [x.text for x in kept] == [x.text for x in before] and sum(bool(x.text.strip()) for x in before) > 3
    for wave, one, other in zip(waves, found, before, strict=True):
        assert one.text == (other.text if len(wave) == longest else "") and (one.segments == []) == (not one.text)
    assert [x.ctc for x in found] == ["a" if len(wave) == longest else "" for wave in waves]
    assert {x.ctc for x in before} == {None}
    [spoken] = [x for x in found if x.text]
    assert spoken.segments[0].no_speech_prob < 0.6 < kept[0].segments[0].no_speech_prob


@pytest.mark.parametrize("limits", [{"batch_size": 0}, {"max_new_tokens": 0}])
def test_limits_below_one_are_refused(model: SpeechLM, waves: list[Tensor], limits: dict[str, int]):
    with pytest.raises(UserError, match="found 0, expected (a whole number )?at least 1"):
        model.transcribe(waves, **limits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 16_000), np.float32), r"audio 1: found float32 of shape \(2, 16000\), expected samples"),
        (torch.zeros(16_000, dtype=torch.int32), "audio 1: found int32"),
        ([0.5, 0.25], "audio 1: found float, expected a path"),
        ([Path("a.wav"), None], r"a\.wav"),
        ({"array": np.zeros(9)}, "audio 1: found dict"),
        (io.BytesIO(b"RIFF\nWAVE"), "audio 1: found BytesIO"),
        (None, "audio 1: found NoneType"),
        (np.array([None]), "audio 1: found object"),
        (torch.full((500,), torch.nan), "audio 1: holds NaN"),
        ("nowhere.wav", r"nowhere\.wav"),
        (b"no audio", "audio 1: cannot be decoded"),
    ],
)
def test_transcribe_names_what_cannot_be_read(model: SpeechLM, wrong: object, message: str):
    with pytest.raises(AudioError, match=message):
        model.transcribe(wrong)  # type: ignore[arg-type]


def test_a_broken_recording_does_not_stop_the_others(model: SpeechLM, waves: list[Tensor]):
    options = Options.given(max_new_tokens=3, **ONCE)
    found = dict(transcribe(model, [waves[0], "nowhere.wav", waves[4]], options=options))
    assert isinstance(found[1], BadSample) and (found[1].index, found[1].id) == (1, "nowhere.wav")
    assert [found[0], found[2]] == model.transcribe([waves[0], waves[4]], max_new_tokens=3, **ONCE)


def test_decoding_stops_at_a_rate_no_speaker_reaches(model: SpeechLM, waves: list[Tensor]):
    long = torch.cat(waves * 2)[:32_000]
    for transcript, limit in zip(model.transcribe([waves[0], long], **ONCE), (16, 100), strict=True):
        assert len(transcript.ids) == limit if transcript.cut else len(transcript.ids) <= limit


def test_rows_say_whose_text_it_is(model: SpeechLM, waves: list[Tensor], tmp_path: Path):
    rows = transcribe_batch(model, collate(samples(waves[:2])), Options.given(max_new_tokens=4, **ONCE))
    transcripts = model.transcribe(waves[:2], max_new_tokens=4, **ONCE)
    assert rows == [
        Row(f"u{i}", 10 + i, f"ref {i}", found.text, "de", "asr", found.seconds, found.cut)
        for i, found in enumerate(transcripts)
    ]
    write_rows(tmp_path / "r.jsonl", [rows[1], rows[0]])
    first, second = (tmp_path / "r.jsonl").read_text().splitlines()
    assert '"id": "u0", "index": 10' in first and '"index": 11' in second


def test_rows_carry_what_is_said_of_texts(model: SpeechLM, waves: list[Tensor], tmp_path: Path):
    [sample] = samples(waves[:1])
    told = {"source_lang": "en", "source_text": "2 + 2", "answers": ("four", "4")}
    prompted = replace(sample, **told, prompt_ids=tuple(model.tokenizer.encode("Say it:")))
    rows = transcribe_batch(model, collate([prompted]), Options.given(max_new_tokens=4, **ONCE))
    assert {name: getattr(rows[0], name) for name in told} == told and rows[0].prompt == "Say it:"
    write_rows(tmp_path / "r.jsonl", rows)
    assert read_rows(tmp_path / "r.jsonl") == rows


def test_a_task_without_a_state_lists_those_there_are(model: SpeechLM, waves: list[Tensor]):
    with pytest.raises(UserError, match="found no state named 'st', expected one of asr; name it with --task"):
        model.transcribe(waves, task="st")


def test_what_is_longer_than_the_audio_of_training_is_read_in_pieces(model: SpeechLM, waves: list[Tensor]):
    model.trained_on = TrainedOn(utterances=3, hours=0.1, longest_seconds=1.0)
    try:
        [found] = model.transcribe(torch.cat(waves * 2), **ONCE)
        bounds = [(segment.start, segment.end) for segment in found.segments]
        assert len(bounds) == 3 and bounds[0][0] == 0 and bounds[-1][1] == found.seconds
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))
        assert all(end - start <= 1.2 for start, end in bounds)
        [whole] = model.transcribe(torch.cat(waves * 2), max_segment=60, **ONCE)
        assert len(whole.segments) == 1 and whole.segments[0].id == 0
        assert found.text == " ".join(segment.text.strip() for segment in found.segments)
    finally:
        model.trained_on = None


class Scripted:
    """An engine that gives texts from a table, by the number of samples and the temperature; `ctc` by the former."""

    def __init__(
        self,
        table: dict[tuple[int, float], tuple[str, float]],
        model: SpeechLM,
        ctc: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        self.table, self.ctc, self.tokenizer = table, ctc, model.tokenizer
        self.requests: list[Request] = []
        self.waiting: list[Request] = []

    def __call__(self, model, options, slots, *_: object) -> "Scripted":
        return self

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting)

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        self.waiting.append(request)

    def poll(self, seconds: float = 0.0) -> list[Done]:
        request = self.waiting.pop()
        size = len(request.sample.waveform)
        text, logprob = self.table[size, request.temperature]
        ids = tuple(self.tokenizer.encode(text))
        numbers = (logprob,) * (len(ids) + 1)
        return [Done(request, [Hypothesis(ids, numbers, numbers, cut=False)], self.ctc.get(size))]


def test_a_text_that_failed_is_made_again_at_the_next_temperature(model: SpeechLM, monkeypatch: pytest.MonkeyPatch):
    table = {
        (16_000, 0.0): ("unlikely", -1.5),
        (16_000, 0.5): ("la " * 100, -0.1),
        (16_000, 1.0): ("at last", -3.0),
        (8_000, 0.0): ("at once", -0.2),
    }
    engine = Scripted(table, model)
    monkeypatch.setattr("rwkv_speech.decoding.transcriber.Engine", engine)
    options = {"temperature": (0, 0.5, 1.0), "vad": "none"}
    long, short = model.transcribe([torch.rand(16_000), torch.rand(8_000)], **options)
    assert (long.text, long.segments[0].temperature) == ("at last", 1.0)
    assert long.segments[0].avg_logprob == pytest.approx(-3.0)
    assert (short.text, short.segments[0].temperature) == ("at once", 0.0)
    assert sorted(request.temperature for request in engine.requests) == [0, 0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.2, ["Said", "Said one", "Said one two"]), (0.6, ["Said"] * 3)]
)
def test_context_is_the_text_so_far_unless_it_was_guessed(
    model: SpeechLM, monkeypatch: pytest.MonkeyPatch, temperature: float, expected: list[str]
):
    pieces = (24_000, 20_000, 19_000)
    monkeypatch.setattr(
        "rwkv_speech.decoding.transcriber.Segmenter",
        lambda *_: SimpleNamespace(
            push=lambda x: map(Piece, (0, 1, 2), x.split(pieces)), finish=list, removed_samples=0
        ),
    )
    table = {(size, temperature): (text, -0.1) for size, text in zip(pieces, ("one", "two", "three"), strict=True)}
    engine = Scripted(table, model)
    monkeypatch.setattr("rwkv_speech.decoding.transcriber.Engine", engine)
    options = {"temperature": temperature, "condition_on_previous_text": True, "initial_prompt": "Said"}
    [found] = model.transcribe(torch.rand(sum(pieces)), **options)
    assert found.text == "one two three"
    assert [request.before for request in engine.requests] == expected
    model.transcribe(torch.rand(sum(pieces)), **{**options, "condition_on_previous_text": False})
    assert [request.before for request in engine.requests[3:]] == ["Said"] * 3


@pytest.mark.parametrize(
    ("vad", "texts", "expected"),
    [
        ("silero", ("the dog waits", "call the man"), ["the dog waits", "call the man"]),
        ("silero", ("the cat", "call me"), ["the cat", "call me"]),
        ("silero", ("nothing at all", "nobody"), ["my cat"]),
        ("none", ("the dog waits", "call the man"), ["my cat"]),
    ],
)
def test_a_piece_whose_text_lacks_words_is_decoded_in_two_if_that_is_better(
    model: SpeechLM, monkeypatch: pytest.MonkeyPatch, vad: str, texts: tuple[str, str], expected: list[str]
):
    whole, ctc = Piece(500, loud_where(SENTENCES)), ctc_of(SENTENCES)
    parts = halves(whole, ctc, LABELS, "my cat", 320)
    assert parts is not None
    sizes = [len(piece.waveform) for piece in (whole, *parts)]
    segmenter = SimpleNamespace(push=lambda x: [whole], finish=list, removed_samples=0)
    monkeypatch.setattr("rwkv_speech.decoding.transcriber.Segmenter", lambda *_: segmenter)
    table = {(size, 0.0): (text, -0.1) for size, text in zip(sizes, ("my cat", *texts), strict=True)}
    heard = (ctc, ctc_of("the dog waits"), ctc_of("call the man"))
    engine = Scripted(table, model, dict(zip(sizes, heard, strict=True)))
    monkeypatch.setattr("rwkv_speech.decoding.transcriber.Engine", engine)
    monkeypatch.setattr(model, "ctc", SimpleNamespace(spec=CtcSpec(LABELS)))
    [found] = model.transcribe([torch.rand(16_000)], temperature=0.0, vad=vad)
    assert [segment.text for segment in found.segments] == expected
    places = parts if len(expected) == 2 else [whole]
    assert [(s.start, s.end) for s in found.segments] == [(x.start / 16_000, x.end / 16_000) for x in places]
    assert len(engine.requests) == (1 if vad == "none" else 3)


def test_the_ctc_head_judges_no_text_that_is_not_what_is_heard(model: SpeechLM, monkeypatch: pytest.MonkeyPatch):
    size = 16_000
    silence = torch.tensor([1.0, 1e-9]).log().expand(50, 2)
    engine = Scripted({(size, 0.0): ("a dog barks", -0.1)}, model, {size: silence})
    monkeypatch.setattr("rwkv_speech.decoding.transcriber.Engine", engine)
    monkeypatch.setattr(model, "ctc", SimpleNamespace(spec=CtcSpec("a")))
    options = Options.given(0.0, vad="none")
    sounds = [Recording(task, task, lambda: [torch.rand(size)], task) for task in ("asr", "sound")]
    found = {recording.key: result for recording, result in Transcriber(model, options, 2).run(sounds)}
    assert {task: result.text for task, result in found.items()} == {"asr": "", "sound": "a dog barks"}  # type: ignore[union-attr]


def test_recordings_that_join_and_leave_do_not_change_the_others(model: SpeechLM, waves: list[Tensor]):
    common = Options.given(max_new_tokens=6, **ONCE)
    others = [common, replace(common, initial_prompt="the weather"), replace(common, temperature="0.7")]
    recordings = [
        Recording(number, "", partial(list, wave.split(1_000)), "asr", options=others[number % 3])
        for number, wave in enumerate(waves)
    ]
    alone = {x.key: Transcriber(model, common, 2).run([x]) for x in recordings}
    expected = {key: result for found in alone.values() for (x, result) in found for key in [x.key]}
    transcriber, found = Transcriber(model, common, 2), {}
    for recording in recordings:
        transcriber.submit(recording)
        found |= {x.key: result for x, result in transcriber.poll()}
    transcriber.cancel(5)
    transcriber.cancel("unknown")
    while len(found) < len(waves) - 1:
        found |= {x.key: result for x, result in transcriber.poll()}
    assert found == {key: result for key, result in expected.items() if key != 5}
    assert transcriber.poll() == [] and transcriber.engine.num_unfinished == 0
    plain = {key: model.transcribe(waves[key], max_new_tokens=6, **ONCE)[0].text for key in found}
    assert {key % 3 for key, text in plain.items() if found[key].text != text} == {1, 2}  # type: ignore[union-attr]


def test_rows_come_from_batches_of_any_size(model: SpeechLM, waves: list[Tensor]):
    several = [collate(samples(waves)[:3]), collate([]), collate(samples(waves)[3:])]
    rows = sorted(transcribe_batches(model, several, Options.given(**ONCE)), key=lambda row: row.index)
    assert rows == transcribe_batch(model, collate(samples(waves)), Options.given(**ONCE))
    assert list(transcribe_batches(model, [])) == []


def test_the_language_is_found_by_its_state_and_picks_that_of_recognition(
    tiny_parts: Parts, waves: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    model = SpeechLM.build(tiny_parts, task_names=["asr", "asr_fr", "lid"]).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    wave, flags = waves[2], {"max_new_tokens": 6, **ONCE}
    texts = {task: model.transcribe(wave, task=task, **flags)[0] for task in ("asr", "asr_fr", "lid")}
    assert texts["asr"].ids != texts["asr_fr"].ids != texts["lid"].ids and texts["asr"].language is None
    found = model.transcribe(wave, language="auto", **flags)[0]
    assert (found.language, found.ids) == (texts["lid"].text.strip(), texts["asr"].ids)
    given = model.transcribe(wave, language="fr", **flags)[0]
    assert (given.language, given.ids) == ("fr", texts["asr_fr"].ids)
    decode, lid = model.tokenizer.decode, tuple(texts["lid"].ids)
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: " FR\n" if tuple(ids) == lid else decode(ids))
    found = model.transcribe(wave, language="auto", **flags)[0]
    assert (found.language, found.ids) == ("FR", texts["asr_fr"].ids)
    [row] = transcribe_batch(model, collate(samples([wave])), Options.given(language="auto", **flags))
    assert row.found_lang == "FR"


def test_without_a_state_that_finds_languages_auto_is_an_error(model: SpeechLM, waves: list[Tensor]):
    with pytest.raises(UserError, match="--language: found auto, but the weights have no state 'lid'"):
        model.transcribe(waves[0], language="auto")
