"""The native decoding step against the model in PyTorch's operations, and what its bits do not depend on."""

# L layers · B slots · n tokens

import copy
import pickle
import shutil
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
from rwkv_speech.ops import build, native

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
SIZES: dict[str, dict[str, Any]] = {
    "x060, odd ranks": {},
    "x060, ranks of 1.6B and 3B": {"n_layer": 3, "C": 192, "vocab": 101, "mix_rank": 32, "decay_rank": 64, "ffn": 672},
    "x060, ranks of 7B": {"n_layer": 1, "C": 256, "vocab": 300, "mix_rank": 64, "decay_rank": 128, "ffn": 896},
    "x070, odd ranks": {},
    "x070, ranks of 1.5B": {
        "n_layer": 3, "C": 192, "vocab": 101, "decay_rank": 96, "rate_rank": 96, "value_rank": 64, "gate_rank": 256,
        "ffn": 768,
    },
    "x070, one layer": {"n_layer": 1, "C": 256, "vocab": 300, "ffn": 1024},
}  # fmt: skip
FAMILIES = ("x060", "x070")
# Of the logits and the state against PyTorch in float32; in bfloat16 PyTorch's activations are rounded, too.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.int8: 2e-2}

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")


def load(
    folder: Path, dtype: torch.dtype = torch.float32, form: str = "auto", family: str = "x060", **sizes: Any
) -> RWKV:
    path = folder / f"{len(list(folder.iterdir()))}.pth"  # models map their files: never written again
    torch.save(RANDOM_TENSORS[family](**sizes), path)
    floats, quant = (torch.bfloat16, "int8") if dtype == torch.int8 else (dtype, "")
    return read_lm(path, floats, form=form, quant=quant)


@pytest.fixture
def model(tmp_path: Path) -> RWKV:
    return load(tmp_path)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_state(model: RWKV, slots: int) -> State:
    torch.manual_seed(3)
    return State(*(torch.randn_like(x) for x in model.zero_state(slots)))


def copied(state: State) -> State:
    return State(*(x.clone() for x in state))


def random_ids(model: RWKV, *shape: int) -> Tensor:
    return torch.randint(model.sizes.vocab, shape, generator=torch.Generator().manual_seed(4))


def assert_native(model: RWKV) -> None:
    assert model._stepper() is not None, "nothing native is tested"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_step_equals_pytorch(name: str, dtype: torch.dtype, tmp_path: Path):
    model = load(tmp_path, dtype, family=name[:4], **SIZES[name])
    plain = load(tmp_path, dtype, "torch", name[:4], **SIZES[name])
    assert_native(model)
    assert plain._stepper() is None
    for slots in (1, 2, 3, 5, 9):
        got, want = (random_state(model, slots) for _ in range(2))
        for ids in random_ids(model, 4, slots):
            logits = model.step(ids, got)
            assert_rms_close("logits", logits, plain.step(ids, want), TOLERANCES[dtype])
            assert logits.dtype == torch.float32 and logits.std() > 0.1
        for part, *pair in zip(State._fields, got, want, strict=True):
            assert_rms_close(part, *pair, TOLERANCES[dtype])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["auto", "torch"])
def test_tokens_of_a_few_slots_equal_separate_sequences(form: str, family: str, tmp_path: Path):
    model = load(tmp_path, form=form, family=family)
    state = random_state(model, 6)
    before = copied(state)
    lengths = {4: 3, 0: 1, 5: 7}
    ids = {slot: random_ids(model, length) for slot, length in lengths.items()}
    slots = torch.tensor([slot for slot, length in lengths.items() for _ in range(length)])
    logits = model.step(torch.cat(list(ids.values())), state, slots)
    for slot, part in ids.items():
        row = torch.tensor([slot])
        alone = model(part[None], state=before.select(row))
        assert_rms_close(f"logits of slot {slot}", logits[slots == slot], alone.logits[0], 1e-5)
        for name, *pair in zip(State._fields, state.select(row), alone.state, strict=True):
            assert_rms_close(f"{name} of slot {slot}", *pair, 1e-5)
    untouched = torch.tensor([1, 2, 3])
    assert all(torch.equal(x, y) for x, y in zip(state.select(untouched), before.select(untouched), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_bits_depend_neither_on_other_slots_nor_on_threads(
    dtype: torch.dtype, family: str, tmp_path: Path, threads: None
):
    model = load(tmp_path, dtype, family=family)
    assert_native(model)
    whole = random_state(model, 300)  # so many that several threads are worth it
    before = copied(whole)
    ids = random_ids(model, 300)
    logits = model.step(ids, whole)
    assert logits.unique(dim=0).shape[0] == 300
    for count in (1, 3):
        torch.set_num_threads(count)
        again = copied(before)
        assert torch.equal(model.step(ids, again), logits)
        assert all(torch.equal(x, y) for x, y in zip(again, whole, strict=True))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    for n in (1, 2, 3, 4, 5, 6, 7, 16):
        rows, state = order[:n], copied(before)
        assert torch.equal(model.step(ids[rows], state, rows), logits[rows])
        assert all(torch.equal(x, y) for x, y in zip(state.select(rows), whole.select(rows), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_several_tokens_at_once_have_the_bits_of_one_by_one(dtype: torch.dtype, family: str, tmp_path: Path):
    model = load(tmp_path, dtype, family=family)
    assert_native(model)
    ids, one_by_one = random_ids(model, 23), random_state(model, 2)
    state = copied(one_by_one)
    wanted = torch.cat([model.step(token[None], one_by_one, torch.tensor([1])) for token in ids])
    found = [model.step(part, state, torch.ones(len(part))) for part in ids.split([1, 9, 13])]
    assert torch.equal(torch.cat(found), wanted)
    assert all(torch.equal(x, y) for x, y in zip(state, one_by_one, strict=True))


@pytest.mark.parametrize(
    ("ids", "slots"),
    [([3, 272], None), ([3, -1], None), ([3], None), ([3, 4, 5], [0, 1, 0]), ([3], [2]), ([3], [-1])],
    ids=str,
)
def test_ids_and_slots_that_are_not_there_are_errors(ids: list[int], slots: list[int] | None, model: RWKV):
    state = random_state(model, 2)
    before = copied(state)
    with pytest.raises(IndexError, match="expected ids below 272 and slots below 2"):
        model.step(torch.tensor(ids), state, None if slots is None else torch.tensor(slots))
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_a_state_that_could_not_be_changed_in_place_is_an_error(model: RWKV):
    wkv, *shifts = random_state(model, 2)
    bad = [(wkv.double(), *shifts), (wkv[:, :1].expand_as(wkv), *shifts), (wkv, shifts[0].bfloat16(), shifts[1])]
    for state in bad:
        with pytest.raises(ValueError, match="step: state must be dense"):
            model.step(torch.tensor([1, 2]), State(*state))


def test_no_tokens_are_no_logits(model: RWKV):
    assert model.step(torch.zeros(0), model.zero_state(0)).shape == (0, 272)


def test_weights_that_come_to_another_place_are_found_again(tmp_path: Path):
    model, other = load(tmp_path), load(tmp_path, seed=1)
    ids = random_ids(model, 2)

    def step(model: RWKV) -> Tensor:
        return model.step(ids, random_state(model, 2))

    first = step(model)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(torch.equal(step(x), first) for x in copies)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(step(model), step(other)) and not torch.equal(step(model), first)
    model.load_state_dict(load(tmp_path).state_dict())  # into the same place
    assert torch.equal(step(model), first)
    assert_rms_close("logits", step(model.to(torch.bfloat16)), first, 3e-2)
    model.requires_grad_()
    assert model._stepper() is None


def test_without_a_compiler_pytorch_serves_with_one_warning(
    tmp_path: Path, model: RWKV, monkeypatch: pytest.MonkeyPatch
):
    ids = random_ids(model, 2)
    want = model.step(ids, random_state(model, 2))
    monkeypatch.setattr(build, "CACHE", tmp_path / "build")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    native._cpu.cache_clear()
    model = load(tmp_path)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler found") as warnings:
        for _ in range(2):
            assert_rms_close("logits", model.step(ids, random_state(model, 2)), want, 1e-5)
    assert len(warnings) == 1
    native._cpu.cache_clear()


@pytest.mark.soak
@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_other_instruction_sets_equal_pytorch(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernels of this processor, compiled for a lesser one."""
    flags = dict.fromkeys(build._ISA_FLAGS, build._ISA_FLAGS[isa])
    monkeypatch.setattr(build, "_ISA_FLAGS", flags)
    monkeypatch.setattr(build, "CACHE", tmp_path / "build")
    native._cpu.cache_clear()
    for dtype in TOLERANCES:
        for name in SIZES:
            test_step_equals_pytorch(name, dtype, tmp_path)
        for family in FAMILIES:
            test_several_tokens_at_once_have_the_bits_of_one_by_one(dtype, family, tmp_path)
    native._cpu.cache_clear()
