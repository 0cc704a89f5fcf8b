import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from rwkv_speech.audio import CONV_KERNELS, CONV_STRIDES, MIN_SAMPLES, receptive_field
from rwkv_speech.encoder import SpeechEncoder, normalise
from rwkv_speech.errors import UserError

FAMILIES: dict[str, tuple[type, type]] = {
    "wavlm": (WavLMConfig, WavLMModel),
    "hubert": (HubertConfig, HubertModel),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "seven": {},
    "three": {
        "conv_dim": (16,) * 3,
        "conv_kernel": (160, 8, 8),
        "conv_stride": (20, 4, 4),
        "num_feat_extract_layers": 3,
    },
}
# (family, normalisation of the convolutions, convolutions)
KINDS = [
    *((family, norm, "seven") for family in FAMILIES for norm in ("layer", "group")),
    ("wavlm", "layer", "three"),
    ("hubert", "group", "three"),
]


def make_model(family: str, norm: str, convolutions: str) -> nn.Module:
    """A tiny model whose weights are large enough for attention, positions and biases to matter."""
    config_class, model_class = FAMILIES[family]
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "num_buckets": 32,
        "max_bucket_distance": 64,
        "conv_bias": True,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
    }
    torch.manual_seed(0)
    model = model_class(config_class(**(sizes | CONVOLUTIONS[convolutions])))
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn_like(x) * 0.3 if x.dim() > 1 else x + 0.3 * torch.randn_like(x))
    return model.eval()


def save(folder: Path, model: Any, **preprocessor: bool) -> Path:
    model.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SpeechEncoder, nn.Module]:
    """Our encoder, read from a folder, and transformers' own model that was written there."""
    model = make_model(*request.param)
    folder = save(tmp_path_factory.mktemp("encoder"), model, do_normalize=True)
    return SpeechEncoder.from_pretrained(folder), model


@pytest.fixture(scope="module")
def wavlm() -> SpeechEncoder:
    return SpeechEncoder(make_model("wavlm", "layer", "seven"), "wavlm")


def sound(samples: int, seed: int = 0) -> Tensor:
    """Noise off zero, so that normalising it matters."""
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed)) + 0.02


def batch_of(lengths: list[int], padding: float = 0.0) -> tuple[Tensor, Tensor]:
    waveforms = [sound(samples, seed) for seed, samples in enumerate(lengths)]
    return nn.utils.rnn.pad_sequence(waveforms, batch_first=True, padding_value=padding), torch.tensor(lengths)


def feature_extractor(waveform: Tensor) -> Tensor:
    """transformers' own normalisation of one utterance, (1, S)."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    return extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_values


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
    for samples in (3_000, encoder.min_samples):
        frames, lengths = encoder(sound(samples)[None], torch.tensor([samples]))
        expected = model(feature_extractor(sound(samples))).last_hidden_state
        assert frames.shape == expected.shape and lengths.tolist() == [expected.shape[1]]
        assert frames.dtype == torch.float32
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_forward_of_a_batch_equals_each_alone(pair: tuple[SpeechEncoder, Any]):
    encoder, _ = pair
    # Those in the middle are too short for a frame, or just long enough for one.
    waveforms, num_samples = batch_of([4_000, 1_500, 0, 40, encoder.min_samples - 1, encoder.min_samples, 2_777])
    frames, lengths = encoder(waveforms, num_samples)
    assert torch.isfinite(frames).all() and lengths.tolist()[2:6] == [0, 0, 0, 1]
    for row, samples in enumerate(num_samples.tolist()):
        alone, [length] = encoder(waveforms[row : row + 1, :samples], num_samples[row : row + 1])
        assert length == lengths[row]
        torch.testing.assert_close(frames[row, :length], alone[0, :length], rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_without_care_would_show(pair: tuple[SpeechEncoder, Any]):
    """The control of the test above: these models do feel padding."""
    _, model = pair
    wave = feature_extractor(sound(1_500))
    alone = model(wave).last_hidden_state[0]
    padded = model(nn.functional.pad(wave, (0, 2_500))).last_hidden_state[0, : len(alone)]
    assert (padded - alone).abs().max() > 1e-2


def test_forward_of_short_inputs_only_gives_no_frame(pair: tuple[SpeechEncoder, Any]):
    encoder, _ = pair
    waveforms, num_samples = batch_of([encoder.min_samples - 1, 0, 1])
    frames, lengths = encoder(waveforms, num_samples)
    assert lengths.tolist() == [0, 0, 0] and torch.isfinite(frames).all()
    frames, lengths = encoder(torch.zeros(1, 0), torch.tensor([0]))
    assert lengths.tolist() == [0] and torch.isfinite(frames).all()


def test_frame_lengths_equal_the_models_own(pair: tuple[SpeechEncoder, Any]):
    encoder, model = pair
    num_samples = torch.cat((encoder.min_samples + torch.arange(0, 1_000), torch.arange(15_900, 16_100)))
    assert torch.equal(encoder.frame_lengths(num_samples), model._get_feat_extract_output_lengths(num_samples))
    assert not encoder.frame_lengths(torch.arange(encoder.min_samples)).any()
    assert encoder.frame_lengths(torch.tensor([encoder.min_samples])).tolist() == [1]


def test_min_samples_is_the_receptive_field():
    assert receptive_field(CONV_KERNELS, CONV_STRIDES) == MIN_SAMPLES == 400
    assert receptive_field((160, 8, 8), (20, 4, 4)) == 860
    assert SpeechEncoder(make_model("wavlm", "layer", "three"), "three").min_samples == 860


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


def test_from_pretrained_reads_float32_whatever_the_file_holds(tmp_path: Path):
    folder = save(tmp_path, make_model("wavlm", "layer", "seven").half())
    encoder = SpeechEncoder.from_pretrained(folder)
    assert {x.dtype for x in encoder.parameters()} == {torch.float32}
    assert encoder(*batch_of([800]))[0].dtype == torch.float32


@torch.no_grad()
def test_from_pretrained_respects_do_normalize(tmp_path: Path):
    model: Any = make_model("wavlm", "layer", "seven")
    plain = SpeechEncoder.from_pretrained(save(tmp_path, model, do_normalize=False))
    waveform = sound(2_000)[None]
    frames, _ = plain(waveform, torch.tensor([2_000]))
    torch.testing.assert_close(frames, model(waveform).last_hidden_state, rtol=0, atol=1e-5)
    (tmp_path / "preprocessor_config.json").unlink()
    by_default = SpeechEncoder.from_pretrained(tmp_path)
    expected = model(feature_extractor(waveform[0])).last_hidden_state
    torch.testing.assert_close(by_default(waveform, torch.tensor([2_000]))[0], expected, rtol=0, atol=1e-5)
    assert (expected - frames).abs().max() > 1e-2


@torch.no_grad()
def test_forward_without_normalising_ignores_what_stands_in_the_padding():
    encoder = SpeechEncoder(make_model("hubert", "group", "seven"), "hubert", do_normalize=False)
    waveforms, num_samples = batch_of([300, 1_500], padding=9.0)
    frames, lengths = encoder(waveforms, num_samples)
    alone, _ = encoder(waveforms[1:, :1_500], num_samples[1:])
    assert lengths.tolist() == [0, 4]
    torch.testing.assert_close(frames[1, :4], alone[0], rtol=0, atol=1e-4)


def test_from_pretrained_names_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="give a folder, or an id such as microsoft/wavlm-large") as caught:
        SpeechEncoder.from_pretrained(tmp_path / "gone")
    assert str(tmp_path / "gone") in str(caught.value)


def test_from_pretrained_names_a_folder_without_weights(tmp_path: Path):
    make_model("wavlm", "layer", "seven").config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="weights") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_names_weights_that_cannot_be_read(tmp_path: Path):
    save(tmp_path, make_model("wavlm", "layer", "seven"))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="weights") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_names_weights_that_are_not_all_there(tmp_path: Path):
    model: Any = make_model("wavlm", "layer", "seven")
    save(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["masked_spec_embed"]  # not in every published file, and not needed
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    SpeechEncoder.from_pretrained(tmp_path)
    del tensors["encoder.layers.1.attention.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors, encoder\.layers\.1\.attention\.k_proj\.weight") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_refuses_an_encoder_with_an_adapter_of_its_own(tmp_path: Path):
    Wav2Vec2Config(add_adapter=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="add_adapter"):
        SpeechEncoder.from_pretrained(tmp_path)


def test_from_pretrained_names_a_wrong_model_type(tmp_path: Path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model type 'bert', expected one of .*wavlm.*hubert.*wav2vec2") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_reads_the_older_names_of_weight_norm(tmp_path: Path):
    """As the published WavLM files have them: weight_g and weight_v."""
    model = make_model("wavlm", "layer", "seven")
    save(tmp_path / "new", model)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): x
        for name, x in tensors.items()
    }
    assert older.keys() - tensors.keys() == {f"encoder.pos_conv_embed.conv.weight_{part}" for part in "gv"}
    model.config.save_pretrained(tmp_path / "old")  # type: ignore[union-attr, operator]
    torch.save(older, tmp_path / "old" / "pytorch_model.bin")
    loaded = SpeechEncoder.from_pretrained(tmp_path / "old").model.state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())


@pytest.mark.soak
def test_a_file_of_wavlm_large_s_shape_loads_and_encodes(tmp_path: Path):
    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    save(tmp_path, WavLMModel(config), do_normalize=True)
    encoder = SpeechEncoder.from_pretrained(tmp_path)
    assert encoder.width == 1024 and 300e6 < sum(x.numel() for x in encoder.parameters()) < 330e6
    frames, lengths = encoder(torch.randn(2, 16_000), torch.tensor([16_000, 9_000]))
    assert frames.shape == (2, 49, 1024) and lengths.tolist() == [49, 27]
