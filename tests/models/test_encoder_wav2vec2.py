"""What the waveform families answer themselves; their frames are compared in test_encoder.py."""

from typing import Any

import pytest
import torch
from tiny_encoders import batch_of, make_model

from rwkv_speech.errors import UserError
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.encoder_wav2vec2 import check_config


def test_an_encoder_of_another_rate_says_so():
    model: Any = make_model("wav2vec2", "layer", "three")
    half = type(model)(model.config.__class__(**{**model.config.to_dict(), "conv_stride": (20, 8, 4)})).eval()
    encoder = SpeechEncoder(half, "25 Hz")
    assert encoder.framing.frame_rate == 25 and encoder.numbers_per_second == 25 * 32
    waveforms, num_samples = batch_of([16_000, 9_000])
    frames, lengths = encoder(waveforms, num_samples)
    assert torch.equal(lengths, half._get_feat_extract_output_lengths(num_samples)) and frames.shape[1] == lengths[0]


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
