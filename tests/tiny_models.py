"""Random checkpoints in the published layouts, small enough for every test run."""

import torch
from torch import Tensor

HEAD_SIZE = 64


class _Random:
    """Tensors whose every number matters: no zeros, no ones."""

    def __init__(self, C: int, seed: int, dtype: torch.dtype) -> None:
        self.C, self.dtype = C, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(*shape, generator=self.generator)).to(self.dtype)

    def mixes(self, prefix: str, names: str) -> dict[str, Tensor]:
        return {f"{prefix}{n}": torch.rand(1, 1, self.C, generator=self.generator).to(self.dtype) for n in names}

    def norm(self, name: str) -> dict[str, Tensor]:
        weight = self.normal(self.C, scale=0.2, mean=1.0)
        return {f"{name}.weight": weight, f"{name}.bias": self.normal(self.C, scale=0.1)}

    def matrix(self, name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self.normal(rows, columns, scale=columns**-0.5)}


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
    random = _Random(C, seed, dtype)
    normal, norm, matrix, mixes = random.normal, random.norm, random.matrix, random.mixes

    def block(i: int) -> dict[str, Tensor]:
        att, ffn_ = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        tensors = norm(f"blocks.{i}.ln0") if i == 0 else {}
        tensors |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | mixes(f"{att}time_maa_", "xwkvrg")
        tensors[att + "time_maa_w1"] = normal(C, 5 * mix_rank, scale=C**-0.5)
        tensors[att + "time_maa_w2"] = normal(5, mix_rank, C, scale=0.3 * mix_rank**-0.5)
        tensors[att + "time_decay"] = normal(1, 1, C, scale=2.0, mean=-2.5)
        tensors[att + "time_decay_w1"] = normal(C, decay_rank, scale=C**-0.5)
        tensors[att + "time_decay_w2"] = normal(decay_rank, C, scale=decay_rank**-0.5)
        tensors[att + "time_faaaa"] = normal(C // HEAD_SIZE, HEAD_SIZE, scale=0.5)
        for name in ("receptance", "key", "value", "gate", "output"):
            tensors |= matrix(att + name, C, C)
        tensors |= norm(att + "ln_x") | mixes(f"{ffn_}time_maa_", "kr")
        return (
            tensors | matrix(ffn_ + "key", ffn, C) | matrix(ffn_ + "receptance", C, C) | matrix(ffn_ + "value", C, ffn)
        )

    tensors = {"emb.weight": normal(vocab, C, scale=0.5)}
    for i in range(n_layer):
        tensors |= block(i)
    return tensors | norm("ln_out") | matrix("head", vocab, C)


def random_rwkv7_tensors(
    n_layer: int = 2,
    C: int = 128,
    vocab: int = 272,
    decay_rank: int = 16,
    rate_rank: int = 12,
    value_rank: int = 8,
    gate_rank: int = 24,
    ffn: int = 192,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """An x070 checkpoint whose every tensor matters; decays from slow to the fastest that there is."""
    random = _Random(C, seed, dtype)
    normal, norm, matrix, mixes = random.normal, random.norm, random.matrix, random.mixes

    def low_rank(name: str, rank: int, start: bool = True) -> dict[str, Tensor]:
        tensors = {f"{name}0": normal(1, 1, C, scale=1.5)} if start else {}
        down, up = normal(C, rank, scale=C**-0.5), normal(rank, C, scale=rank**-0.5)
        return tensors | {f"{name}1": down, f"{name}2": up}

    def block(i: int) -> dict[str, Tensor]:
        att, ffn_ = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        tensors = norm(f"blocks.{i}.ln0") if i == 0 else {}
        tensors |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | mixes(f"{att}x_", "rwkvag")
        tensors |= low_rank(f"{att}w", decay_rank) | low_rank(f"{att}a", rate_rank)
        tensors |= low_rank(f"{att}v", value_rank) if i else {}
        tensors |= low_rank(f"{att}g", gate_rank, start=False)
        tensors |= {f"{att}{name}": normal(1, 1, C, scale=0.3, mean=1.0) for name in ("k_k", "k_a")}
        tensors[f"{att}r_k"] = normal(C // HEAD_SIZE, HEAD_SIZE, scale=0.3)
        for name in ("receptance", "key", "value", "output"):
            tensors |= matrix(att + name, C, C)
        tensors |= norm(att + "ln_x") | mixes(f"{ffn_}x_", "k")
        return tensors | matrix(ffn_ + "key", ffn, C) | matrix(ffn_ + "value", C, ffn)

    tensors = {"emb.weight": normal(vocab, C, scale=0.5)}
    for i in range(n_layer):
        tensors |= block(i)
    return tensors | norm("ln_out") | matrix("head", vocab, C)


RANDOM_TENSORS = {"x060": random_rwkv6_tensors, "x070": random_rwkv7_tensors}
