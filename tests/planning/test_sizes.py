import dataclasses

import pytest
import torch
from tiny_encoders import make_model
from transformers import WavLMConfig, WavLMModel

from rwkv_speech.errors import UserError
from rwkv_speech.models.adapter import Adapter
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.planning.sizes import BASE_MODELS, WAVLM_LARGE, EncoderSizes, MicroBatch, ModelSizes, Setup

SMALL = RWKV6Sizes(vocab=300, n_layer=3, C=128, H=2, ffn=192, mix_rank=8, decay_rank=16)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("sizes", [SMALL, *BASE_MODELS.values()], ids=["small", *BASE_MODELS])
def test_lm_parameters_are_the_modules(sizes: RWKV6Sizes):
    with torch.device("meta"):
        assert ModelSizes(sizes, WAVLM_LARGE).lm_parameters() == parameters(RWKV6(sizes))


def test_base_models_are_of_the_published_sizes():
    billions = {name: ModelSizes(sizes, WAVLM_LARGE).lm_parameters() / 1e9 for name, sizes in BASE_MODELS.items()}
    assert billions == pytest.approx({"1.6B": 1.6, "3B": 3.1, "7B": 7.63, "14B": 14.07}, rel=0.01)


def test_trained_parameters_of_the_published_setting():
    model = ModelSizes(BASE_MODELS["3B"], WAVLM_LARGE)
    assert model.adapter_parameters() == parameters(Adapter(1024, 2560, 5, 2048))
    assert model.state_parameters() == 32 * 40 * 64 * 64  # 5.2 M, as the README says
    assert model.trained_parameters() == model.adapter_parameters() + model.state_parameters()


def test_wavlm_large_is_transformers_own():
    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    with torch.device("meta"):
        assert EncoderSizes.of(WavLMModel(config)) == WAVLM_LARGE


@pytest.mark.parametrize("family", ["wavlm", "hubert", "wav2vec2"])
def test_encoder_sizes_are_the_models(family: str):
    model = make_model(family, "layer", "seven")
    sizes = EncoderSizes.of(model)
    assert sizes.parameters == parameters(model)
    assert sizes.bias_heads == (2 if family == "wavlm" else 1)
    weights = [layer.conv.weight for layer in model.feature_extractor.conv_layers]
    assert sizes.conv_parameters() == [weight.numel() for weight in weights]
    assert sizes.frames(2.0) == model._get_feat_extract_output_lengths(torch.tensor(32_000))


def test_positions_and_targets_of_a_micro_batch():
    model, batch = ModelSizes(SMALL, WAVLM_LARGE), MicroBatch(4, 10.0, 30)
    # 10 s are 499 frames, 99 audio tokens of five; a separator, and the end of text among the targets.
    assert batch.positions(model) == 4 * (99 + 1 + 30)
    assert batch.targets() == 4 * 31


def test_setup_knows_its_zero_stage():
    stages = [Setup(strategy=name).zero_stage() for name in ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_3")]
    assert stages == [0, 0, 1, 3]


def test_setup_names_a_strategy_that_is_not_known():
    with pytest.raises(UserError, match="--strategy: found 'fsdp', expected one of auto, ddp, deepspeed_stage_1"):
        dataclasses.replace(Setup(), strategy="fsdp")
