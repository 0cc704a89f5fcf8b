"""The model that a plan is made for has the published sizes, and those of the real one."""

import pytest
import torch
from tiny_encoders import make_model
from transformers import WavLMConfig, WavLMModel

from rwkv_speech import tiny
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import FrameOptions, Parts
from rwkv_speech.models.peft import LoraSpec
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.planning.measure import BASE_MODELS, WAVLM_LARGE, MicroBatch, Sizes, build_encoder, world_sizes


def test_base_models_have_the_published_sizes():
    assert BASE_MODELS["1.6B"] == RWKV6Sizes(65536, 24, 2048, 32, 7168, 32, 64)
    assert BASE_MODELS["3B"] == RWKV6Sizes(65536, 32, 2560, 40, 8960, 32, 64)
    assert BASE_MODELS["7B"] == RWKV6Sizes(65536, 32, 4096, 64, 14336, 64, 128)
    assert BASE_MODELS["14B"] == RWKV6Sizes(65536, 61, 4096, 64, 14336, 64, 128)


def test_base_models_have_the_published_numbers_of_parameters():
    billions = {name: Sizes(lm).parameters["lm"] / 1e9 for name, lm in BASE_MODELS.items()}
    assert billions == pytest.approx({"1.6B": 1.6, "3B": 3.1, "7B": 7.63, "14B": 14.07}, rel=0.01)


def test_channels_that_no_head_divides_are_named():
    with pytest.raises(UserError, match="--n_embd: found 2500, expected a multiple of 64"):
        world_sizes(32, 2500)


def test_parameters_of_the_published_setting():
    count = Sizes(BASE_MODELS["3B"]).parameters
    assert count["encoder"] == 315_453_120
    assert count["adapter"] == (5120 + 1) * 2048 + (2048 + 1) * 2560
    assert count["initial_states"] == 32 * 40 * 64 * 64  # 5.2 M, as the README says


def test_parameters_are_those_of_the_model_from_its_files():
    model = SpeechLM.build(Parts("tiny"), task_names=["asr", "st_es"])
    sizes = Sizes(model.lm.sizes, model.encoder.model.config.to_json_string(), 3, 512, num_states=2)
    for name in ("lm", "encoder", "adapter"):
        assert sizes.parameters[name] == sum(p.numel() for p in getattr(model, name).parameters())
    assert sizes.trained == sum(p.numel() for p in model.trained_parameters())


def test_packed_and_tuned_models_are_counted_as_they_are_built():
    lora, parts = LoraSpec(4, 8.0, "key,gate"), "ln,state_offset"
    for quant in ("", "int8", "nf4"):
        model = SpeechLM.build(Parts("tiny", quant=quant, lora=lora, train_parts=parts))
        sizes = Sizes(
            model.lm.sizes, stack=3, adapter_hidden=512, quant=quant, lora=lora, train_parts="ln,state_offset"
        )
        tuned = {id(x) for x in model.tuned.values()}
        assert sizes.lm_bytes(torch.float32) == sum(x.nbytes for x in model.lm.parameters() if id(x) not in tuned)
        assert sizes.parameters["tuned"] == sum(x.numel() for x in model.tuned.values())
        assert sizes.parameters["lm"] + sizes.parameters["tuned"] == Sizes(model.lm.sizes).parameters["lm"] + sum(
            x.numel() for name, x in model.tuned.items() if "lora_" in name or name.endswith("state_offset")
        )


@pytest.mark.parametrize(("quant", "most"), [("", 1.0), ("int8", 0.55), ("nf4", 0.35)])
def test_an_encoder_is_counted_as_it_is_kept(quant: str, most: float):
    frames = FrameOptions(quant=quant)
    here = SpeechEncoder.from_pretrained(tiny.ENCODER, torch.bfloat16, frames)
    sizes = Sizes(BASE_MODELS["3B"], here.model.config.to_json_string(), frames=frames)
    assert sizes.encoder_bytes(torch.bfloat16) == sum(x.nbytes for x in here.parameters())
    large, packed = (Sizes(BASE_MODELS["3B"], frames=FrameOptions(quant=kind)) for kind in ("", quant))
    assert packed.encoder_bytes(torch.bfloat16) <= most * large.encoder_bytes(torch.bfloat16)
    assert packed.parameters == large.parameters


@pytest.mark.parametrize(("quant", "most"), [("int8", 0.55), ("nf4", 0.30)])
@pytest.mark.parametrize("name", ["3B", "7B"])
def test_packed_models_take_the_share_of_memory_that_they_should(name: str, quant: str, most: float):
    plain, packed = (Sizes(BASE_MODELS[name], quant=kind).lm_bytes(torch.bfloat16) for kind in ("", quant))
    assert packed <= most * plain


def test_wavlm_large_is_transformers_own():
    config = WavLMConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                         feat_extract_norm="layer", do_stable_layer_norm=True)  # fmt: skip
    with torch.device("meta"):
        theirs = WavLMModel(config)
    assert {n: x.shape for n, x in build_encoder(WAVLM_LARGE).model.named_parameters() if "attention" not in n} == {
        n: x.shape for n, x in theirs.named_parameters() if "attention" not in n
    }


@pytest.mark.parametrize("family", ["wavlm", "hubert", "wav2vec2"])
def test_an_encoder_is_built_again_from_its_configuration(family: str):
    model = make_model(family, "layer", "three")
    found = build_encoder(model.config.to_json_string())
    assert sorted(x.numel() for x in found.model.parameters()) == sorted(x.numel() for x in model.parameters())


def test_positions_of_a_micro_batch():
    # 10 s are 499 frames, 99 audio tokens of five; and a separator.
    assert Sizes(BASE_MODELS["3B"]).positions(MicroBatch(4, 10.0, 30)) == 4 * (99 + 1 + 30)
