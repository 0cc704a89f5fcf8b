"""Random checkpoints in the published layouts, small enough for every test run."""

import torch
from torch import Tensor

HEAD_SIZE = 64


def random_rwkv6_tensors(
    n_layer: int = 2,
    C: int = 128,
    vocab: int = 272,
    mix_rank: int = 8,
    decay_rank: int = 16,
    ffn: int = 192,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """An x060 checkpoint whose every tensor matters: no zeros, no ones, decays from slow to fast."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(*shape, generator=generator)).to(dtype)

    def mixes(prefix: str, names: str) -> dict[str, Tensor]:
        return {f"{prefix}time_maa_{n}": torch.rand(1, 1, C, generator=generator).to(dtype) for n in names}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(C, scale=0.2, mean=1.0), f"{name}.bias": normal(C, scale=0.1)}

    def matrix(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(rows, columns, scale=columns**-0.5)}

    def block(i: int) -> dict[str, Tensor]:
        att, ffn_ = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        tensors = norm(f"blocks.{i}.ln0") if i == 0 else {}
        tensors |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | mixes(att, "xwkvrg")
        tensors[att + "time_maa_w1"] = normal(C, 5 * mix_rank, scale=C**-0.5)
        tensors[att + "time_maa_w2"] = normal(5, mix_rank, C, scale=0.3 * mix_rank**-0.5)
        tensors[att + "time_decay"] = normal(1, 1, C, scale=2.0, mean=-2.5)
        tensors[att + "time_decay_w1"] = normal(C, decay_rank, scale=C**-0.5)
        tensors[att + "time_decay_w2"] = normal(decay_rank, C, scale=decay_rank**-0.5)
        tensors[att + "time_faaaa"] = normal(C // HEAD_SIZE, HEAD_SIZE, scale=0.5)
        for name in ("receptance", "key", "value", "gate", "output"):
            tensors |= matrix(att + name, C, C)
        tensors |= norm(att + "ln_x") | mixes(ffn_, "kr")
        return (
            tensors | matrix(ffn_ + "key", ffn, C) | matrix(ffn_ + "receptance", C, C) | matrix(ffn_ + "value", C, ffn)
        )

    tensors = {"emb.weight": normal(vocab, C, scale=0.5)}
    for i in range(n_layer):
        tensors |= block(i)
    return tensors | norm("ln_out") | matrix("head", vocab, C)
