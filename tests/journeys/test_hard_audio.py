"""Audio whose headers lie, on every road that leads from a file to samples."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from data.test_tar_shards import write_tar
from hard_files import HERTZ, hard_files, heard, sound, tones

from rwkv_speech.batch import BadSample
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding import piece_text, transcribe, transcriber
from rwkv_speech.decoding.engine import Done
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.tokenizer import WorldTokenizer

NAMES = ["total_68719476735.flac", "frames_5.mp3", "no_xing.mp3", "size_0.wav", "granule_40000000000.ogg", "two.opus",
         "picture.mp3", "aac.mp4", "opus.webm", "windows.wma", "gsm.wav"]  # fmt: skip
RAW = "headerless.raw"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, each with its text beside it, and one that nobody can read."""
    folder, made = tmp_path_factory.mktemp("hard"), hard_files()
    for name in NAMES:
        (folder / name).write_bytes(made[name][0])
        (folder / name).with_suffix(".txt").write_text(name)
    (folder / RAW).write_bytes(sound(tones(), "WAV")[44:])
    return folder


def as_folder(folder: Path, tmp_path: Path) -> str:
    return str(folder)


def as_manifest(folder: Path, tmp_path: Path) -> str:
    rows = [{"audio_filepath": str(folder / name), "text": name} for name in [*NAMES, RAW]]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "m.jsonl")


def as_dataset(folder: Path, tmp_path: Path) -> str:
    audio = [{"bytes": (folder / name).read_bytes(), "path": None} for name in [*NAMES, RAW]]
    rows = datasets.Dataset.from_dict({"audio": audio, "text": [*NAMES, RAW]})
    rows.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def as_shard(folder: Path, tmp_path: Path) -> str:
    paths = [path for path in sorted(folder.iterdir()) if path.name != RAW]
    return f"tar:{write_tar(tmp_path / 'x.tar', {path.name: path.read_bytes() for path in paths})}"


@pytest.mark.parametrize("road", [as_folder, as_manifest, as_dataset, as_shard])
def test_every_source_gives_all_of_the_audio(folder: Path, tmp_path: Path, road):
    source = open_source(road(folder, tmp_path))
    data = SpeechDataset(source, WorldTokenizer())
    found = [data[index] for index in range(len(data))]
    bad = [sample for sample in found if isinstance(sample, BadSample)]
    assert ["nobody can know the rate" in sample.reason for sample in bad] == [True] * (len(found) - len(NAMES))
    good = {sample.text: sample.waveform.numpy() for sample in found if not isinstance(sample, BadSample)}
    assert {name: heard(waveform) for name, waveform in good.items()} == {
        name: list(HERTZ) * (2 if name == "two.opus" else 1) for name in NAMES
    }
    # What the lengths of batches are planned from.
    for known, sample in zip(source.durations(), found, strict=True):
        assert np.isnan(known) or known == pytest.approx(sample.duration, abs=0.1)


def test_prediction_gives_all_of_the_audio_and_names_what_is_broken(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Listener:
        """An engine whose texts say what is heard."""

        num_unfinished = 0

        def __init__(self, model, options, slots, window):
            self.waiting = []

        def submit(self, request):
            self.waiting.append(request)

        def poll(self, seconds):
            done, self.waiting = self.waiting, []
            return [Done(x, [Hypothesis(heard(x.sample.waveform.numpy()), (0.0,), (0.0,), False)], None) for x in done]

    monkeypatch.setattr(transcriber, "Engine", Listener)
    monkeypatch.setattr(piece_text, "Reader", lambda model: None)
    tokenizer = SimpleNamespace(decode=lambda ids: str(list(ids)))
    model = SimpleNamespace(initial_states={"asr": None}, trained_on=None, tokenizer=tokenizer, ctc=None)
    options = Options.given(0.0, vad="none")
    files = [folder / name for name in [*NAMES, RAW]]
    for audio in (files, [path.read_bytes() for path in files]):
        found = [result for _, result in transcribe.transcribe(model, audio, options=options)]
        assert [result.text for result in found[:-1]] == [
            str(list(HERTZ) * (2 if name == "two.opus" else 1)) for name in NAMES
        ]
        assert isinstance(found[-1], BadSample) and "nobody can know the rate" in found[-1].reason


def test_a_duration_above_what_there_is_makes_the_utterance_bad(tmp_path: Path):
    (tmp_path / "a.mp3").write_bytes(hard_files()["no_xing.mp3"][0])
    rows = [{"audio_filepath": "a.mp3", "text": "x", "duration": seconds} for seconds in (2.1, 3.0)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    members = {f"{i}.mp3": (tmp_path / "a.mp3").read_bytes() for i in range(2)}
    members |= {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)}
    for spec in (str(tmp_path / "m.jsonl"), f"tar:{write_tar(tmp_path / 'x.tar', members)}"):
        fits, short = (SpeechDataset(open_source(spec), WorldTokenizer())[index] for index in range(2))
        assert not isinstance(fits, BadSample)
        assert isinstance(short, BadSample) and "expected the 3.000 s that its duration says" in short.reason
