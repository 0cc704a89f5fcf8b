"""RWKV-7 against pip's `rwkv` (BlinkDL); with RWKV-6 against itself in test_rwkv.py."""

from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from lm_cases import check_against_pip, make_model, pip_rwkv, random_ids
from safetensors.torch import load_file
from tiny_models import random_rwkv7_tensors

from rwkv_speech import tiny
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import RWKV7Sizes
from rwkv_speech.models.rwkv7 import RWKV7
from rwkv_speech.models.states import States, read_states

SIZES = {
    "tiny": {},
    "ranks of 1.5B": {
        "n_layer": 3, "C": 192, "vocab": 100, "decay_rank": 96, "rate_rank": 96, "value_rank": 64, "gate_rank": 256,
        "ffn": 768,
    },
    "one layer": {"n_layer": 1, "C": 256, "vocab": 300, "ffn": 1024},
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_rwkv7_logits_equal_pip_rwkv(name: str, tmp_path: Path):
    model = make_model(tmp_path, "x070", **SIZES[name])
    assert isinstance(model, RWKV7)
    assert {key: getattr(model.sizes, key) for key in SIZES[name]} == SIZES[name]
    check_against_pip(model, tmp_path / "base.pth", v7=True, tolerance=1e-4)


def test_the_embedded_rwkv7_is_pip_rwkv_s(tmp_path: Path):
    """What was trained has decays, rates and gates of its own."""
    file = tiny.BASE_MODELS["tiny7"]
    torch.save({name: x.float() for name, x in load_file(file).items()}, tmp_path / "base.pth")
    check_against_pip(RWKV7.from_pretrained(file), tmp_path / "base.pth", v7=True, tolerance=1e-3)


def test_rwkv7_takes_a_file_with_a_value_mix_of_the_first_layer(tmp_path: Path):
    tensors = random_rwkv7_tensors()
    extra = {f"blocks.0.att.v{i}": tensors[f"blocks.1.att.v{i}"] for i in range(3)}
    torch.save(tensors | extra, tmp_path / "base.pth")
    torch.save(tensors, tmp_path / "plain.pth")
    one, other = (RWKV7.from_pretrained(tmp_path / name) for name in ("base.pth", "plain.pth"))
    ids = random_ids(one, 1, 9)
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_rwkv7_published_state_starts_pip_rwkv_as_it_starts_ours(tmp_path: Path):
    """A state file in the layout of RWKV-PEFT and of pip's tools, which take it as it is, without a transpose."""
    model = make_model(tmp_path, "x070")
    s = model.sizes
    state = 0.3 * torch.randn(s.n_layer, s.H, s.N, s.N, generator=torch.Generator().manual_seed(1))
    States(tmp_path / "none", {"asr": state}, "", "").write(tmp_path / "state.pth")
    published = torch.load(tmp_path / "state.pth", weights_only=True)
    assert list(published) == [f"blocks.{i}.att.time_state" for i in range(s.n_layer)]
    ids = random_ids(model, 1, 12)
    with pip_rwkv(tmp_path / "base.pth", v7=True) as peer:
        start = peer.generate_zero_state()
        for i in range(s.n_layer):
            start[3 * i + 1] = published[f"blocks.{i}.att.time_state"].float()
        want, _ = peer.forward(ids[0].tolist(), start, full_output=True)
    [read] = read_states(tmp_path / "state.pth").states.values()
    zero = model.zero_state(1)
    got = model(ids, state=zero._replace(wkv=read[:, None]))
    assert_rms_close("logits", got.logits[0], want, 1e-5)
    assert not torch.allclose(model(ids).logits[0], want, atol=1e-2), "the state has no effect"


def test_rwkv7_refuses_what_it_has_no_parts_for():
    sizes = RWKV7Sizes.of(random_rwkv7_tensors(n_layer=1), "base.pth")
    with pytest.raises(UserError, match="--compile: found 1 with an RWKV-7 model"):
        RWKV7(sizes, fuse=True)
