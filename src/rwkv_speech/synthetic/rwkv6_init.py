"""Initial values of an RWKV-6 that is trained from the beginning."""

from typing import Any

import torch
from torch import nn

from rwkv_speech.models.rwkv6 import RWKV6


@torch.no_grad()
def initialise(model: RWKV6) -> None:
    """RWKV-6's own initial values: slow to fast decay over the channels, mixes that vary with depth."""
    sizes = model.sizes
    channel = torch.arange(sizes.C) / (sizes.C - 1)
    nn.init.uniform_(model.emb.weight, -0.1, 0.1)
    nn.init.orthogonal_(model.head.weight, gain=0.5)
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        depth, left = layer / max(1, sizes.n_layer - 1), 1 - layer / sizes.n_layer
        att, ffn = block.att, block.ffn
        mix = torch.linspace(0, 1, sizes.C)
        for name, power in (("x", left), ("w", left), ("k", left), ("v", left), ("r", 0.5 * left), ("g", 0.5 * left)):
            getattr(att, f"time_maa_{name}").copy_(1 - mix**power)
        att.time_decay.copy_(-6 + 5 * channel ** (0.7 + 1.3 * depth))
        att.time_faaaa.copy_((0.5 * (1 - channel) + (torch.arange(sizes.C) % 3 - 1) * 0.1).view(sizes.H, sizes.N))
        for low_rank in (att.time_maa_w2, att.time_decay_w2, att.time_maa_w1, att.time_decay_w1):
            nn.init.uniform_(low_rank, -0.01, 0.01)
        for linear in (att.receptance, att.key, att.value, att.gate, ffn.key):
            nn.init.orthogonal_(linear.weight)
        for linear in (att.output, ffn.value, ffn.receptance):
            nn.init.normal_(linear.weight, std=0.02)
        ffn.time_maa_k.copy_(1 - mix**left)
        ffn.time_maa_r.copy_(1 - mix**left)
