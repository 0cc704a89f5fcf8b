"""The road from audio to text, on random weights: batches, files, arrays, limits, notes."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import samples, sounds
from torch import Tensor

from rwkv_speech.audio import AudioError
from rwkv_speech.batch import BadSample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.results import Row, Transcript, write_rows
from rwkv_speech.decoding.transcribe import SpeechLM, decode_batch, length_note, transcribe, transcribe_batch
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import TrainedOn

LENGTHS = [3_000, 0, 6_000, 399, 1_450, 5_555, 2_000]


@pytest.fixture(scope="module")
def waves() -> list[Tensor]:
    return sounds(LENGTHS)


def test_decode_batch_equals_reading_the_whole_prefix_again(model: SpeechLM, waves: list[Tensor]):
    found = decode_batch(model, collate(samples(waves)), max_new_tokens=6)
    for wave, transcript in zip(waves, found, strict=True):
        audio, _ = model.audio_tokens(collate(samples([wave])))
        for length in range(len(transcript.ids)):
            prefix = model.lm.emb(torch.tensor([model.separator_id, *transcript.ids[:length]]))
            output = model.lm(inputs_embeds=torch.cat((audio, prefix))[None], state=model.initial_state(["asr"]))
            assert int(output.logits[0, -1].argmax()) == transcript.ids[length]


def test_transcribe_of_a_batch_equals_each_alone_in_order(model: SpeechLM, waves: list[Tensor]):
    together = model.transcribe(waves, batch_size=3, max_new_tokens=8)
    alone = [model.transcribe(wave, max_new_tokens=8)[0] for wave in waves]
    assert together == alone and together == model.transcribe(waves, batch_size=100, max_new_tokens=8)
    assert [transcript.seconds for transcript in together] == [len(wave) / 16_000 for wave in waves]
    assert all(transcript.text == model.tokenizer.decode(transcript.ids) for transcript in together)
    assert len({tuple(transcript.ids) for transcript in together}) > 2  # else order would not show


def test_transcribe_keeps_the_order_of_more_than_it_reads_ahead(model: SpeechLM, waves: list[Tensor]):
    many = waves * 3  # 21 recordings, 8 at a time
    assert model.transcribe(many, 1, 4) == 3 * model.transcribe(waves, 7, 4)


def test_transcribe_of_nothing(model: SpeechLM):
    assert model.transcribe([]) == [] and decode_batch(model, collate([])) == []
    [silent] = model.transcribe([torch.zeros(0)])
    assert silent.seconds == 0 and isinstance(silent.text, str)


def test_transcribe_takes_files_bytes_arrays_and_tensors_alone_or_in_a_list(
    model: SpeechLM, waves: list[Tensor], tmp_path: Path
):
    path = tmp_path / "a.wav"
    soundfile.write(path, waves[0].numpy(), 16_000, subtype="FLOAT")
    double = waves[0].double()
    forms = [path, str(path), path.read_bytes(), waves[0], waves[0].numpy(), double, double.numpy(), waves[0].half()]
    expected = model.transcribe([waves[0]])
    assert [model.transcribe(form) for form in forms[:-1]] == [expected] * 7
    assert model.transcribe(forms[:-1]) == expected * 7 and len(model.transcribe((path, waves[1]))) == 2
    assert model.transcribe(forms[-1])[0].seconds == expected[0].seconds
    assert model.transcribe(form for form in forms[:2]) == expected * 2
    assert (
        model.transcribe(waves[0].numpy().astype(">f4"))
        == model.transcribe(waves[0].clone().requires_grad_())
        == expected
    )
    fixed = (waves[0] * 2**15).round().to(torch.int16)
    assert model.transcribe(fixed) == model.transcribe(fixed.numpy()) == model.transcribe(fixed.double() / 2**15)


@pytest.mark.parametrize("limits", [{"batch_size": 0}, {"max_new_tokens": 0}])
def test_limits_below_one_are_refused(model: SpeechLM, waves: list[Tensor], limits: dict[str, int]):
    with pytest.raises(UserError, match="found 0, expected at least 1"):
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
        (b"no audio", "<bytes>"),
    ],
)
def test_transcribe_names_what_cannot_be_read(model: SpeechLM, wrong: object, message: str):
    with pytest.raises(AudioError, match=message):
        model.transcribe(wrong)  # type: ignore[arg-type]


def test_a_broken_recording_does_not_stop_the_others(model: SpeechLM, waves: list[Tensor]):
    found = dict(transcribe(model, [waves[0], "nowhere.wav", waves[4]], max_new_tokens=3))
    assert isinstance(found[1], BadSample) and (found[1].index, found[1].id) == (1, "nowhere.wav")
    assert [found[0], found[2]] == model.transcribe([waves[0], waves[4]], max_new_tokens=3)


def test_decoding_stops_at_a_rate_no_speaker_reaches(model: SpeechLM, waves: list[Tensor]):
    long = torch.cat(waves * 2)[:32_000]
    for transcript, limit in zip(model.transcribe([waves[0], long]), (16, 50), strict=True):
        assert len(transcript.ids) == limit if transcript.cut else len(transcript.ids) <= limit


def test_rows_say_whose_text_it_is(model: SpeechLM, waves: list[Tensor], tmp_path: Path):
    rows = transcribe_batch(model, collate(samples(waves[:2])), max_new_tokens=4)
    transcripts = model.transcribe(waves[:2], max_new_tokens=4)
    assert rows == [
        Row(f"u{i}", 10 + i, f"ref {i}", found.text, "de", "asr", found.seconds, found.cut)
        for i, found in enumerate(transcripts)
    ]
    write_rows(tmp_path / "r.jsonl", [rows[1], rows[0]])
    first, second = (tmp_path / "r.jsonl").read_text().splitlines()
    assert '"id": "u0", "index": 10' in first and '"index": 11' in second


def test_a_task_without_a_state_lists_those_there_are(model: SpeechLM, waves: list[Tensor]):
    with pytest.raises(UserError, match="found no state named 'st', expected one of asr; name it with --task"):
        model.transcribe(waves, task="st")


def test_audio_much_longer_than_that_of_training_is_noted(model: SpeechLM, waves: list[Tensor]):
    assert length_note(model, [40.0]) == "" and "do not say" in length_note(model, [3.0, 60.0])
    model.trained_on = TrainedOn(utterances=3, hours=0.1, longest_seconds=0.25)
    try:
        assert length_note(model, [0.3]) == ""
        with pytest.warns(UserWarning, match=r"2 recording\(s\) of up to 0\.4 s, but .* trained on up to 0\.2 s"):
            model.transcribe(waves, max_new_tokens=1)
    finally:
        model.trained_on = None


def test_transcript_is_the_public_result():
    assert Transcript("a", [1], 0.5, False).text == "a"
