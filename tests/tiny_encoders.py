"""Random encoders of every kind, and what they are given to hear."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

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


def large_shaped(layers: int) -> WavLMModel:
    """WavLM-Large cut to so many layers, with random weights, gates and biases."""
    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    torch.manual_seed(0)
    model = WavLMModel(config).requires_grad_(False).eval()
    for name, x in model.encoder.named_parameters():
        if "gru_rel_pos_const" in name or "rel_attn" in name:
            x.copy_(torch.randn_like(x))
    return model


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
