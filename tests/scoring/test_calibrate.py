"""Calibration of confidence: which words are right, the data that is decoded, and what is written."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from manifests import write_audio, write_manifest

from rwkv_speech.__main__ import main
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.confidence import Calibration, Evidence
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring import calibrate as room
from rwkv_speech.scoring.calibrate import calibrate
from rwkv_speech.tasks import Naming


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_audio(tmp_path / f"{name}.wav", samples=16_000)
    rows = [{"audio_filepath": f"{name}.wav", "text": "quite another text"} for name in ("a", "b", "c")]
    return write_manifest(tmp_path / "valid.jsonl", *rows)


@pytest.fixture
def checkpoint(tiny_parts: Parts, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SpeechLM.build(tiny_parts)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape))
    model.ctc = CtcHead(model.encoder.width, CtcSpec(" abc", hidden=8))
    model.save(tmp_path / "best.safetensors")
    return tmp_path / "best.safetensors"


def test_every_utterance_is_decoded_as_it_is_and_at_other_speeds_and_with_noise(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    source = open_source(str(manifest))
    plain = source.load(0)
    found = [request for request in room._requests(source, Naming()) if request.key == 0]
    assert len(found) == 9 and {len(request.sample.waveform) for request in found} > {round(16_000 / 1.25), 20_000}
    noises = [x.sample.waveform - plain for x in found if len(x.sample.waveform) == len(plain)]
    powers = [float(10 * torch.log10(plain.square().mean() / noise.square().mean())) for noise in noises if noise.any()]
    assert sorted(powers) == pytest.approx([0, 5, 10, 20], abs=0.3) and len(noises) == 5
    again = [request for request in room._requests(source, Naming()) if request.key == 0]
    assert all(torch.equal(x.sample.waveform, y.sample.waveform) for x, y in zip(found, again, strict=True))
    monkeypatch.setattr(room, "_MOST", 4)
    assert len(list(room._requests(source, Naming()))) == 3  # of many data each comes once


def test_calibrate_fits_and_writes_what_predicts_the_other_half(
    checkpoint: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    truth = Calibration(bias=2.0, logprob=3.0, entropy=0.0, margin=1.0, worst=0.0)
    draw = np.random.default_rng(0)

    def judged(*_: object):
        for number in range(400):
            found = [Evidence(-draw.exponential(), draw.random(), -draw.exponential(), -1.0) for _ in range(8)]
            yield number, [(x, draw.random() < truth.probability(x)) for x in found]

    monkeypatch.setattr(room, "_judged", judged)
    path, before, now = calibrate(checkpoint, str(manifest))
    assert path == checkpoint and before.words == now.words == 3200
    assert now.ece < 0.03 < before.ece and now.nce is not None and before.nce is not None and now.nce > before.nce
    written = Calibration(**(load_trained(checkpoint).confidence or {}))
    found = Evidence(-0.5, 0.5, -0.3, -1.0)
    assert written.probability(found) == pytest.approx(truth.probability(found), abs=0.05)
    assert SpeechLM.from_pretrained(checkpoint).confidence == asdict(written)


def test_calibrate_refuses_what_it_cannot_learn_from(
    checkpoint: Path, manifest: Path, tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["calibrate", str(checkpoint), "--data", str(manifest)]) == 2
    said = capsys.readouterr().err
    assert "of them wrong, in what was recognised, expected at least 20 right and 20 wrong ones; give more" in said
    assert load_trained(checkpoint).confidence is None
    bare = tmp_path / "bare.safetensors"
    SpeechLM.build(tiny_parts).save(bare)
    assert main(["calibrate", str(bare), "--data", str(manifest)]) == 2
    assert "bare.safetensors: found no CTC head, whose agreement confidence needs" in capsys.readouterr().err
