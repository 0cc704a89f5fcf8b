import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import rms_error
from tiny_encoders import FAMILIES, batch_of, feature_extractor, large_shaped, make_model, save, sound
from torch import nn

from rwkv_speech import tiny
from rwkv_speech.errors import UserError
from rwkv_speech.models.encoder import SpeechEncoder, normalise
from rwkv_speech.models.parts import FrameOptions, Parts
from rwkv_speech.models.quantised import pack, unpack
from rwkv_speech.models.speech_lm import SpeechLM

# (family, normalisation of the convolutions, convolutions)
KINDS = [
    *((family, norm, "seven") for family in FAMILIES for norm in ("layer", "group")),
    ("wavlm", "layer", "three"),
    ("hubert", "group", "three"),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SpeechEncoder, nn.Module]:
    """Our encoder, read from a folder, and transformers' own model that was written there."""
    model = make_model(*request.param)
    folder = save(tmp_path_factory.mktemp("encoder"), model, do_normalize=True)
    return SpeechEncoder.from_pretrained(folder), model


@pytest.fixture(scope="module")
def wavlm() -> SpeechEncoder:
    return SpeechEncoder(make_model("wavlm", "layer", "seven"), "wavlm")


def test_normalise_equals_the_feature_extractor():
    waveforms, num_samples = batch_of([900, 5, 400], padding=9.0)
    normal = normalise(waveforms, num_samples)
    for row, samples in enumerate(num_samples.tolist()):
        expected = feature_extractor(waveforms[row, :samples])[0]
        torch.testing.assert_close(normal[row, :samples], expected, rtol=0, atol=1e-5)
        assert not normal[row, samples:].any()


def test_normalise_of_silence_and_of_nothing_is_silence():
    normal = normalise(torch.cat((torch.full((1, 50), 0.25), torch.zeros(1, 50))), torch.tensor([50, 0]))
    assert torch.equal(normal, torch.zeros(2, 50))


@torch.no_grad()
def test_forward_equals_transformers_own_model(pair: tuple[SpeechEncoder, Any]):
    encoder, model = pair
    for samples in (3_000, encoder.framing.min_samples):
        frames, lengths = encoder(sound(samples)[None], torch.tensor([samples]))
        expected = model(feature_extractor(sound(samples))).last_hidden_state
        assert frames.shape == expected.shape and lengths.tolist() == [expected.shape[1]]
        assert frames.dtype == torch.float32
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_forward_of_a_batch_equals_each_alone(pair: tuple[SpeechEncoder, Any]):
    encoder, _ = pair
    least = encoder.framing.min_samples
    # Those in the middle are too short for a frame, or just long enough for one.
    waveforms, num_samples = batch_of([4_000, 1_500, 0, 40, least - 1, least, 2_777])
    frames, lengths = encoder(waveforms, num_samples)
    assert torch.isfinite(frames).all() and lengths.tolist()[2:6] == [0, 0, 0, 1]
    for row, samples in enumerate(num_samples.tolist()):
        alone, [length] = encoder(waveforms[row : row + 1, :samples], num_samples[row : row + 1])
        assert length == lengths[row]
        torch.testing.assert_close(frames[row, :length], alone[0, :length], rtol=0, atol=1e-4)


@torch.no_grad()
def test_frames_of_several_layers_are_theirs_each_normalised(pair: tuple[SpeechEncoder, Any]):
    _, model = pair
    number = model.config.num_hidden_layers
    encoder = SpeechEncoder(copy.deepcopy(model), "e", options=FrameOptions(layers=(1, number)))
    assert encoder.width == 2 * model.config.hidden_size
    waveforms, num_samples = batch_of([4_000, 40, 2_777])
    frames, lengths = encoder(waveforms, num_samples)
    for row, samples in enumerate(num_samples.tolist()):
        if lengths[row]:
            found = model(feature_extractor(waveforms[row, :samples]), output_hidden_states=True)
            outputs = found.hidden_states[1], found.last_hidden_state
            want = torch.cat([nn.functional.layer_norm(x, x.shape[-1:]) for x in outputs], -1)
            torch.testing.assert_close(frames[row, : lengths[row]], want[0], rtol=0, atol=1e-4)
    assert encoder.fingerprint() != SpeechEncoder(copy.deepcopy(model), "e").fingerprint()


def test_layers_belong_to_the_encoder_and_to_the_checkpoint(tiny_parts: Parts, tmp_path: Path):
    with pytest.raises(UserError, match=r"--encoder_layers: found 99, but encoder .* has \d+, expected"):
        SpeechLM.build(Parts(**{**vars(tiny_parts), "encoder_layers": "1,99"}))
    model = SpeechLM.build(Parts(**{**vars(tiny_parts), "encoder_layers": "1"}))
    model.save(tmp_path / "run.safetensors")
    loaded = SpeechLM.from_pretrained(tmp_path / "run.safetensors")
    assert loaded.encoder.layers == (1,)
    with pytest.raises(UserError, match=r"--encoder_layers: found 2, but .*run.safetensors was trained with 1,"):
        SpeechLM.from_pretrained(tmp_path / "run.safetensors", Parts(encoder_layers="2"))


def test_padding_without_care_would_show(pair: tuple[SpeechEncoder, Any]):
    """The control of the test above: these models do feel padding."""
    _, model = pair
    wave = feature_extractor(sound(1_500))
    alone = model(wave).last_hidden_state[0]
    padded = model(nn.functional.pad(wave, (0, 2_500))).last_hidden_state[0, : len(alone)]
    assert (padded - alone).abs().max() > 1e-2


def test_forward_of_normalised_waveforms_does_not_normalise_again(wavlm: SpeechEncoder):
    waveforms, num_samples = batch_of([3_000, 1_500])
    want, _ = wavlm(waveforms, num_samples)
    got, _ = wavlm(normalise(waveforms, num_samples), num_samples, normalised=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    plain, _ = wavlm(waveforms, num_samples, normalised=True)
    assert rms_error(plain, want) > 1e-2


def test_forward_does_not_depend_on_a_trainer_s_autocast(wavlm: SpeechEncoder):
    waveforms, num_samples = batch_of([1_500, 3_000])
    want, _ = wavlm(waveforms, num_samples)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = wavlm(waveforms, num_samples)
    assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_convolutions_over_several_utterances_equal_each_alone(wavlm: SpeechEncoder, rows: int):
    waveforms, num_samples = batch_of([1_500, 400, 4_000, 0, 2_777])
    features = wavlm.family.convolve(waveforms, num_samples, rows)
    assert features.shape == (5, 12, 16)
    for row, samples in enumerate(num_samples.tolist()):
        if samples:
            alone = wavlm.model.feature_extractor(waveforms[row : row + 1, :samples])[0].T
            torch.testing.assert_close(features[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_convolutions_take_as_much_at_once_as_fills_a_gpu(wavlm: SpeechEncoder):
    cuda = torch.device("cuda")
    assert [wavlm.family.rows_at_once(seconds * 16_000, cuda) for seconds in (2, 6, 15, 40)] == [15, 5, 2, 1]
    assert wavlm.family.rows_at_once(400, torch.device("cpu")) == 1
    assert SpeechEncoder(make_model("wavlm", "group", "three"), "group").family.rows_at_once(400, cuda) == 1


def test_bfloat16_of_wavlm_large_s_shape_differs_by_less_than_a_hundredth():
    model = large_shaped(layers=4)
    exact = SpeechEncoder(copy.deepcopy(model), "large")
    narrow = SpeechEncoder(model, "large", dtype=torch.bfloat16)
    waveforms, num_samples = batch_of([16_000, 9_000])
    (want, lengths), (got, _) = exact(waveforms, num_samples), narrow(waveforms, num_samples)
    assert got.dtype == torch.float32 and lengths.tolist() == [49, 27]
    for row, length in enumerate(lengths.tolist()):
        assert 1e-4 < rms_error(got[row, :length], want[row, :length]) < 1e-2


def test_bfloat16_of_the_pretrained_tiny_encoder_differs_by_less_than_a_hundredth():
    exact, narrow = (SpeechEncoder.from_pretrained(tiny.ENCODER, dtype) for dtype in (torch.float32, torch.bfloat16))
    waveforms, num_samples = batch_of([16_000, 9_000])
    (want, lengths), (got, _) = exact(waveforms, num_samples), narrow(waveforms, num_samples)
    for row, length in enumerate(lengths.tolist()):
        assert rms_error(got[row, :length], want[row, :length]) < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_keeps_convolutions_and_norms_in_float32(family: str):
    encoder: Any = SpeechEncoder(make_model(family, "layer", "three"), family, dtype=torch.bfloat16)
    layer = encoder.model.encoder.layers[1]
    assert layer.attention.q_proj.weight.dtype == layer.feed_forward.output_dense.weight.dtype == torch.bfloat16
    assert layer.layer_norm.weight.dtype == encoder.model.encoder.layer_norm.weight.dtype == torch.float32
    outside = [x for name, x in encoder.model.named_parameters() if not name.startswith("encoder.")]
    assert {x.dtype for x in outside} == {torch.float32}


def test_bfloat16_of_a_batch_is_near_each_alone():
    encoder = SpeechEncoder(large_shaped(layers=1), "large", dtype=torch.bfloat16)
    waveforms, num_samples = batch_of([9_000, 0, 3_000])
    frames, lengths = encoder(waveforms, num_samples)
    assert torch.isfinite(frames).all()
    for row in (0, 2):
        alone, [length] = encoder(waveforms[row : row + 1, : num_samples[row]], num_samples[row : row + 1])
        assert length == lengths[row] and rms_error(frames[row, :length], alone[0]) < 1e-2


def small_encoder(family: str, quant: str) -> SpeechEncoder:
    """A random one whose transformer's matrices are large enough to be packed, of the same weights in each call."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    sizes |= {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    if family == "whisper":
        sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96}
    torch.manual_seed(1)
    return SpeechEncoder.from_config({"model_type": family, **sizes}, options=FrameOptions(quant=quant))


@pytest.mark.parametrize("family", [*FAMILIES, "whisper"])
def test_packed_matrices_give_the_frames_of_the_rounded_ones(family: str):
    waveforms, num_samples = batch_of([16_000, 9_000])
    for quant, bits in (("int8", 8.3), ("nf4", 4.3)):
        packed, plain = small_encoder(family, quant), small_encoder(family, "")
        assert packed.weights_sha256() == plain.weights_sha256() and packed.fingerprint() != plain.fingerprint()
        wide = {name: x for name, x in plain.family.transformer.named_modules() if isinstance(x, nn.Linear)}
        wide = {name: x for name, x in wide.items() if min(x.weight.shape) >= 64}
        assert len(wide) == 2 * 6
        before, _ = plain(waveforms, num_samples)
        for name, module in wide.items():
            kept = packed.family.transformer.get_submodule(name)
            numbers = module.weight.numel()
            assert 8 * (kept.weight.nbytes + kept.scale.nbytes) <= (bits + 32 / 64) * numbers
            module.weight.copy_(unpack(*pack(module.weight, quant), torch.float32))
        (got, lengths), (want, _) = packed(waveforms, num_samples), plain(waveforms, num_samples)
        assert not any(x.requires_grad for x in packed.parameters())
        for row, length in enumerate(lengths.tolist()):
            assert rms_error(got[row, :length], want[row, :length]) < 1e-5
            assert rms_error(got[row, :length], before[row, :length]) > 1e-4


@pytest.mark.parametrize(("quant", "bound"), [("int8", 0.02), ("nf4", 0.25)])
def test_the_pretrained_tiny_encoder_says_nearly_the_same_in_fewer_bits(quant: str, bound: float):
    exact = SpeechEncoder.from_pretrained(tiny.ENCODER)
    waveforms, num_samples = batch_of([16_000, 9_000])
    want, lengths = exact(waveforms, num_samples)
    for dtype in (torch.float32, torch.bfloat16):
        packed = SpeechEncoder.from_pretrained(tiny.ENCODER, dtype, FrameOptions(quant=quant))
        assert packed.weights_sha256() == exact.weights_sha256()
        got, _ = packed(waveforms, num_samples)
        for row, length in enumerate(lengths.tolist()):
            assert rms_error(got[row, :length], want[row, :length]) < bound


def test_another_dtype_is_refused():
    with pytest.raises(UserError, match=r"encoder 'w': dtype torch.float16, expected one of .*bfloat16"):
        SpeechEncoder(make_model("wavlm", "layer", "three"), "w", dtype=torch.float16)


@pytest.mark.parametrize("family", ["hubert", "wav2vec2"])
def test_the_families_without_a_bias_use_transformers_own_fused_attention(family: str, tmp_path: Path):
    encoder: Any = SpeechEncoder.from_pretrained(save(tmp_path, make_model(family, "layer", "three")))
    assert encoder.model.config._attn_implementation == "sdpa"


def test_forward_of_short_inputs_only_gives_no_frame(pair: tuple[SpeechEncoder, Any]):
    encoder, _ = pair
    waveforms, num_samples = batch_of([encoder.framing.min_samples - 1, 0, 1])
    frames, lengths = encoder(waveforms, num_samples)
    assert lengths.tolist() == [0, 0, 0] and torch.isfinite(frames).all()
    frames, lengths = encoder(torch.zeros(1, 0), torch.tensor([0]))
    assert lengths.tolist() == [0] and torch.isfinite(frames).all()


def test_frame_lengths_equal_the_models_own(pair: tuple[SpeechEncoder, Any]):
    encoder, model = pair
    num_samples = torch.cat((encoder.framing.min_samples + torch.arange(0, 1_000), torch.arange(15_900, 16_100)))
    assert torch.equal(encoder.frame_lengths(num_samples), model._get_feat_extract_output_lengths(num_samples))
    assert not encoder.frame_lengths(torch.arange(encoder.framing.min_samples)).any()
    assert encoder.frame_lengths(torch.tensor([encoder.framing.min_samples])).tolist() == [1]


def test_min_samples_is_the_receptive_field():
    assert SpeechEncoder(make_model("wavlm", "layer", "seven"), "seven").framing.min_samples == 400
    assert SpeechEncoder(make_model("wavlm", "layer", "three"), "three").framing.min_samples == 860


def test_encoder_never_trains(wavlm: SpeechEncoder):
    waveforms, num_samples = batch_of([1_200, 3_000])
    before, _ = wavlm(waveforms, num_samples)
    nn.Sequential(wavlm).train()
    assert not any(module.training for module in wavlm.modules())
    assert not any(x.requires_grad for x in wavlm.parameters())
    torch.testing.assert_close(wavlm(waveforms, num_samples)[0], before, rtol=0, atol=0)


def test_forward_keeps_no_graph(wavlm: SpeechEncoder):
    waveforms, num_samples = batch_of([1_200])
    frames, _ = wavlm(waveforms.requires_grad_(), num_samples)
    assert not frames.requires_grad and frames.grad_fn is None


@torch.no_grad()
def test_forward_without_normalising_ignores_what_stands_in_the_padding():
    encoder = SpeechEncoder(make_model("hubert", "group", "seven"), "hubert", do_normalize=False)
    waveforms, num_samples = batch_of([300, 1_500], padding=9.0)
    frames, lengths = encoder(waveforms, num_samples)
    alone, _ = encoder(waveforms[1:, :1_500], num_samples[1:])
    assert lengths.tolist() == [0, 4]
    torch.testing.assert_close(frames[1, :4], alone[0], rtol=0, atol=1e-4)
