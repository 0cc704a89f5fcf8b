"""RWKV-6 against pip's `rwkv` (BlinkDL); with RWKV-7 against itself in test_rwkv.py."""

from pathlib import Path

import pytest
from lm_cases import check_against_pip, make_model

SIZES = {
    "tiny": {},
    "ranks of 1.6B and 3B": {"n_layer": 3, "C": 192, "vocab": 100, "mix_rank": 32, "decay_rank": 64, "ffn": 672},
    "ranks of 7B": {"n_layer": 1, "C": 256, "vocab": 300, "mix_rank": 64, "decay_rank": 128, "ffn": 896},
}


@pytest.mark.parametrize("name", SIZES)
def test_rwkv6_logits_equal_pip_rwkv(name: str, tmp_path: Path):
    model = make_model(tmp_path, "x060", **SIZES[name])
    check_against_pip(model, tmp_path / "base.pth", v7=False, tolerance=1e-4)
