"""When a call of a recurrence is PyTorch's operator, which observers see, and when the kernel without one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import wkv6_cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ops import test_wkv7
from rwkv_speech.ops.wkv6 import wkv6, wkv6_step
from rwkv_speech.ops.wkv7 import wkv7, wkv7_step


class Case(NamedTuple):
    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    step: Callable[..., Tensor]
    inputs: list[Tensor]  # of one token
    tokens: list[Tensor]  # the same as the step takes them, but for the state


@pytest.fixture(params=["wkv6", "wkv7"])
def case(request: pytest.FixtureRequest) -> Case:
    op, step, module = {"wkv6": (wkv6, wkv6_step, wkv6_cases), "wkv7": (wkv7, wkv7_step, test_wkv7)}[request.param]
    inputs = module.random_inputs(2, 1, 3, 64, torch.float32)
    return Case(request.param, op, step, inputs, [x[:, 0] if x.dim() == 4 else x for x in inputs[:-1]])


class Names(TorchDispatchMode):
    """Notes the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def test_step_passes_opcheck(case: Case):
    operator = getattr(torch.ops.rwkv_speech, f"{case.name}_step").default
    torch.library.opcheck(operator, (*case.tokens, case.inputs[-1], "auto"))


def test_a_mode_sees_operators_with_the_bits_of_the_calls(case: Case):
    stepped, watched = case.inputs[-1].clone(), case.inputs[-1].clone()
    want = *case.op(*case.inputs), case.step(*case.tokens, stepped), stepped
    with Names() as names:
        got = *case.op(*case.inputs), case.step(*case.tokens, watched), watched
    assert {f"rwkv_speech.{case.name}.default", f"rwkv_speech.{case.name}_step.default"} <= names.found
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_tensors_without_values_have_shapes(case: Case):
    for without in (FakeTensorMode().from_tensor, lambda x: x.to("meta")):
        *tokens, state = map(without, (*case.tokens, case.inputs[-1]))
        assert [x.shape for x in case.op(*map(without, case.inputs))] == [(2, 1, 3, 64), (2, 3, 64, 64)]
        assert case.step(*tokens, state).shape == (2, 3, 64)


def test_gradients_come_only_where_they_are_asked_for(case: Case):
    inputs = [x.requires_grad_() for x in case.inputs]
    assert all(x.requires_grad for x in case.op(*inputs))
    with torch.no_grad():
        assert not any(x.requires_grad for x in case.op(*inputs))


def test_a_compiled_step_has_the_bits_of_the_call(case: Case):
    stepped, compiled = case.inputs[-1].clone(), case.inputs[-1].clone()
    step = torch.compile(case.step, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(*case.tokens, compiled), case.step(*case.tokens, stepped))
    assert torch.equal(compiled, stepped)
