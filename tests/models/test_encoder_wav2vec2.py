"""What the waveform families answer themselves; their frames are compared in test_encoder.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoders import batch_of, make_model

from rwkv_speech.batch import Sample
from rwkv_speech.data.dataset import Fit
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.timestamps import WordTimes
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.encoder_wav2vec2 import check_config
from rwkv_speech.models.parts import Parts


def half_rate() -> Any:
    """A wav2vec2 of 25 frames a second."""
    model: Any = make_model("wav2vec2", "layer", "three")
    return type(model)(model.config.__class__(**{**model.config.to_dict(), "conv_stride": (20, 8, 4)})).eval()


def test_an_encoder_of_another_rate_says_so():
    half = half_rate()
    encoder = SpeechEncoder(half, "25 Hz")
    assert encoder.framing.frame_rate == 25 and encoder.numbers_per_second == 25 * 32
    waveforms, num_samples = batch_of([16_000, 9_000])
    frames, lengths = encoder(waveforms, num_samples)
    assert torch.equal(lengths, half._get_feat_extract_output_lengths(num_samples)) and frames.shape[1] == lengths[0]


def test_a_model_with_an_encoder_of_another_rate_learns_and_transcribes(tiny_parts: Parts, tmp_path: Path):
    half = half_rate()
    half.save_pretrained(tmp_path)
    model = SpeechLM.build(replace(tiny_parts, encoder=str(tmp_path)))
    fit = Fit(23 + 1 + 4, 1, model.encoder.framing)  # the first frame sees 1,420 samples, each further one 640 more
    assert fit.fault(1.0, 4) is None and fit.fault(1.1, 4) and fit.fault(1.0, 5)
    waveforms, num_samples = batch_of([16_000, 9_000])
    samples = [
        Sample(f"u{i}", waveforms[i, :size], "the", [3, 4], size / 16_000, i, "asr")
        for i, size in enumerate(num_samples.tolist())
    ]
    loss = model(collate(samples))
    loss.backward()
    assert loss.isfinite() and all(x.grad is not None for x in model.adapter.parameters())
    model.ctc = CtcHead(model.encoder.width, CtcSpec(" abc", hidden=8)).eval().requires_grad_(False)
    times = WordTimes(model.ctc, model.encoder)
    assert np.diff(times.seconds(np.arange(3))) == pytest.approx([0.04, 0.04])
    [found] = model.eval().transcribe([waveforms[0]], max_new_tokens=3, temperature=0.0)
    assert found.seconds == 1.0


def test_settings_leave_out_where_a_configuration_came_from():
    model: Any = make_model("hubert", "layer", "three")
    model.config.transformers_version, model.config._name_or_path = "9.9", "somewhere"
    settings = SpeechEncoder(model, "hubert").family.settings()
    assert settings["hidden_size"] == 32 and not {"transformers_version", "_name_or_path"} & set(settings)


def test_check_config_refuses_an_adapter():
    config: Any = make_model("wav2vec2", "layer", "three").config
    check_config("plain", config)
    config.add_adapter = True
    with pytest.raises(UserError, match="encoder 'own': shortens its frames itself"):
        check_config("own", config)
