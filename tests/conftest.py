"""Tiny frozen parts with random weights, made once a run: enough to put a whole SpeechLM together on a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_speech.models.parts import Parts

# Their asserts say what was compared.
pytest.register_assert_rewrite("run_files", "assertions")


def write_vocab(path: Path) -> Path:
    """All single bytes, ids 1 to 256, and a few words."""
    tokens = [bytes([i]) for i in range(256)] + [b" the", b" weather", b" is", b" good"]
    rows = []
    for number, token in enumerate(tokens, start=1):
        ascii_only = all(byte < 128 for byte in token)
        rows.append(f"{number} {(token.decode() if ascii_only else token)!r} {len(token)}\n")
    path.write_text("".join(rows))
    return path


def write_wavlm(folder: Path) -> Path:
    """A WavLM of 24 channels, its weights large enough for its frames to differ."""
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    model = WavLMModel(
        WavLMConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(16,) * 7,
            conv_bias=True,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
        )
    )
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn_like(x) if x.dim() > 1 else x)
    model.save_pretrained(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak_minutes", type=float, default=10.0, help="minutes of the server's soak test")


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Files of a base model, an encoder and a vocabulary, all random, all small."""
    from tiny_models import random_rwkv6_tensors

    folder = tmp_path_factory.mktemp("tiny_parts")
    torch.save(random_rwkv6_tensors(), folder / "base.pth")
    return Parts(
        load_model=str(folder / "base.pth"),
        encoder=str(write_wavlm(folder / "wavlm")),
        vocab_file=str(write_vocab(folder / "vocab.txt")),
        stack=2,
        adapter_hidden=16,
    )


@pytest.fixture(scope="session")
def rwkv7_parts(tiny_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The same with a base model of the RWKV-7 family."""
    from tiny_models import random_rwkv7_tensors

    path = tmp_path_factory.mktemp("rwkv7_parts") / "base.pth"
    torch.save(random_rwkv7_tensors(), path)
    return replace(tiny_parts, load_model=str(path))
