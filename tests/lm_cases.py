"""Random language models of both families, states and ids for them, and pip's `rwkv` (BlinkDL) to compare with."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_rms_close
from tiny_models import RANDOM_TENSORS
from torch import Tensor

from rwkv_speech.models.families import read_lm
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.state import State


def make_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> RWKV:
    """A random model, whose file is base.pth."""
    torch.save(RANDOM_TENSORS[family](**sizes), folder / "base.pth")
    return read_lm(folder / "base.pth", dtype)


def random_state(model: RWKV, batch: int) -> State:
    torch.manual_seed(3)
    return State(*(torch.randn_like(x) for x in model.zero_state(batch)))


def random_ids(model: RWKV, *shape: int) -> Tensor:
    return torch.randint(model.sizes.vocab, shape, generator=torch.Generator().manual_seed(4))


def assert_same_state(got: State, want: State, tol: float = 1e-5) -> None:
    for name, *pair in zip(State._fields, got, want, strict=True):
        assert_rms_close(name, *pair, tol)


@contextlib.contextmanager
def pip_rwkv(file: Path, v7: bool) -> Iterator[Any]:
    """The peer's model of a file; its module reads the environment when it is loaded, so each family has a copy."""
    spec = importlib.util.find_spec("rwkv.model")
    if spec is None or spec.origin is None:
        pytest.skip("pip's rwkv is not installed")
    name = f"pip_rwkv_model_{7 if v7 else 6}"
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in {"JIT_ON": "0", "CUDA_ON": "0", "V7_ON": "1" if v7 else "0"}.items():
            environment.setenv(f"RWKV_{variable}", value)
        environment.delenv("RWKV_RESCALE_LAYER", raising=False)
        if name not in sys.modules:
            copy = importlib.util.spec_from_file_location(name, spec.origin)
            assert copy is not None and copy.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(copy)
            copy.loader.exec_module(sys.modules[name])
        quiet = {} if v7 else {"verbose": False}
        yield sys.modules[name].RWKV(str(file.with_suffix("")), "cpu fp32", **quiet)


def pip_state(state: State, v7: bool) -> list[Tensor]:
    """One sequence's state as pip's `rwkv` keeps it: three tensors a layer, in RWKV-6 the matrices [key, value]."""
    layers = zip(*(x[:, 0].clone() for x in state), strict=True)
    return [x for wkv, att, ffn in layers for x in (att, wkv if v7 else wkv.transpose(1, 2).contiguous(), ffn)]


def check_against_pip(model: RWKV, file: Path, v7: bool, tolerance: float) -> None:
    """Logits and states: whole, from no state and from one, and one token more, which goes another way in both."""
    with pip_rwkv(file, v7) as peer:
        for state in (None, random_state(model, 1)):
            ids = random_ids(model, 1, 41)
            got = model(ids, state=state)
            before = None if state is None else pip_state(state, v7)
            want, after = peer.forward(ids[0].tolist(), before, full_output=True)
            assert (got.logits[0] - want).abs().max() < tolerance
            assert want.std() > 0.1, "a test of nothing"
            for ours, theirs in zip(pip_state(got.state, v7), after, strict=True):
                assert_rms_close("state", ours, theirs, 1e-5)
            want, _ = peer.forward(ids[0, :1].tolist(), after)
            stepped = State(*(x.clone() for x in got.state))
            got = model(ids[:, :1], state=got.state)
            assert (got.logits[0, 0] - want).abs().max() < tolerance
            assert (model.step(ids[0, :1], stepped)[0] - want).abs().max() < tolerance
