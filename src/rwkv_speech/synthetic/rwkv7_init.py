"""Initial values of an RWKV-7 that is trained from the beginning."""

from typing import Any

import torch
from torch import nn

from rwkv_speech.models.base import RWKV7Sizes
from rwkv_speech.models.rwkv7 import RWKV7


def ranks(C: int) -> tuple[int, int, int, int]:
    """The low-rank sizes of decay, rate, value mix and gate that a model of C channels is given."""
    decay, rate, value, gate = (max(32, 32 * round(factor * C**0.5 / 32)) for factor in (2.5, 2.5, 1.7, 5.0))
    return decay, rate, value, gate


@torch.no_grad()
def initialise(model: RWKV7) -> None:
    """RWKV-7's own initial values: decays that rise over the channels and within a head, layers that begin as nothing.

    Source: RWKV-LM, RWKV-v7/train_temp/src/model.py.
    """
    sizes: Any = model.sizes
    C = sizes.C
    nn.init.uniform_(model.emb.weight, -0.1, 0.1)
    nn.init.orthogonal_(model.head.weight, gain=0.5)
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        left, part = 1 - layer / sizes.n_layer, torch.arange(C) / C
        for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            getattr(block.att, f"x_{name}").copy_(1 - part ** (power * left))
        block.ffn.x_k.copy_(1 - part ** (left**4))
        _time_mix(block.att, layer, sizes)
        for linear, width in (
            (block.att.receptance, 0.5),
            (block.att.key, 0.05),
            (block.att.value, 0.5),
            (block.ffn.key, 0.5),
        ):
            nn.init.uniform_(linear.weight, -width / C**0.5, width / C**0.5)
        for linear in (block.att.output, block.ffn.value):
            nn.init.zeros_(linear.weight)


def _time_mix(att: Any, layer: int, sizes: RWKV7Sizes) -> None:
    """The constants and low-rank parts of a layer's time mix."""
    depth, channel = layer / max(1, sizes.n_layer - 1), torch.arange(sizes.C) / (sizes.C - 1)
    linear = channel - 0.5
    zigzag = torch.linspace(-1, 1, sizes.N).repeat(sizes.H)
    zigzag = zigzag * zigzag.abs()
    att.w0.copy_(-5.5 + 6 * channel ** (1 + depth**0.3) + 2.5 * zigzag)
    att.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
    if layer:
        att.v0.copy_(0.73 - 0.4 * linear)
    att.k_k.copy_(0.71 - 0.1 * linear)
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    att.ln_x.weight.fill_(((1 + layer) / sizes.n_layer) ** 0.7)
    for name in "wavg" if layer else "wag":
        nn.init.zeros_(getattr(att, f"{name}1"))
        nn.init.orthogonal_(getattr(att, f"{name}2"), gain=0.1)
