from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from tiny_models import RANDOM_TENSORS
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech.models.families import read_lm
from rwkv_speech.models.quantised import NF4, pack, product, unpack

KINDS = ("int8", "nf4")


def test_int8_rounds_the_weights_and_nothing_else():
    torch.manual_seed(0)
    weight = torch.randn(600, 96) * torch.logspace(-3, 3, 600)[:, None]
    weight[5] = 0
    given = weight.clone()
    stored, scale = pack(weight, "int8")
    assert torch.equal(weight, given)
    rounded = stored * scale[:, None]
    assert stored.abs().amax(1).tolist() == [127 if row != 5 else 0 for row in range(600)]
    assert ((rounded - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253.9).all()
    assert torch.equal(unpack(stored, scale, torch.float32), rounded)
    for shape in ((96,), (1, 96), (2, 7, 96)):
        x = torch.randn(shape)
        assert_rms_close(
            "float32", product(x, stored, scale, torch.float32), F.linear(x.double(), rounded.double()), 1e-6
        )
        got = product(x.bfloat16(), stored, scale, torch.bfloat16)
        assert got.dtype == torch.bfloat16 and got.shape == (*shape[:-1], 600)
        assert_rms_close("bfloat16", got, F.linear(x.bfloat16().double(), rounded.double()), 5e-3)


def test_nf4_has_the_published_levels():
    """Quantiles of the normal distribution, seven below zero, eight above, as the paper's code makes them."""
    last = 0.9677083
    above, below = torch.linspace(last, 0.5, 9).double()[:-1], torch.linspace(last, 0.5, 8).double()[:-1]
    levels = torch.cat([torch.special.ndtri(above), -torch.special.ndtri(below), torch.zeros(1)]).sort().values
    assert (levels / levels.max()).tolist() == pytest.approx(NF4, abs=2e-6)


@pytest.mark.parametrize("K", [64, 96, 320])
def test_nf4_takes_the_nearest_level_of_each_block(K: int):
    torch.manual_seed(1)
    weight = torch.randn(1100, K) * torch.logspace(-3, 3, 1100)[:, None]
    weight[7] = 0
    stored, scale = pack(weight, "nf4")
    block = 64 if K % 64 == 0 else 32
    assert stored.nbytes + scale.nbytes == weight.numel() // 2 + 2 * weight.numel() // block
    blocks = weight.view(1100, -1, block)
    largest = blocks.abs().amax(-1, keepdim=True).bfloat16().float()
    choices = (largest[..., None] * torch.tensor(NF4)).expand(*blocks.shape, 16)
    nearest = choices.gather(-1, (choices - blocks[..., None]).abs().argmin(-1, keepdim=True)).view(1100, K)
    found = unpack(stored, scale, torch.float32)
    wrong = (found != nearest) & ((found - weight).abs() > 1.00001 * (nearest - weight).abs())
    assert not wrong.any()
    assert_rms_close("rounding", found, weight, 0.11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_its_gradient_are_those_of_the_unpacked_matrix(kind: str, dtype: torch.dtype):
    torch.manual_seed(2)
    stored, scale = pack(torch.randn(1500, 128), kind)
    W = unpack(stored, scale, torch.float32)
    x = torch.randn(3, 5, 128).to(dtype).requires_grad_()
    y = product(x, stored, scale, dtype)
    gradient = torch.randn(3, 5, 1500).to(dtype)
    y.backward(gradient)
    assert y.dtype == x.grad.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert_rms_close("product", y, x.detach().double() @ W.double().T, bound)
    assert_rms_close("gradient", x.grad, gradient.double() @ W.double(), bound)


def kept_bytes(x: Tensor, forward) -> int:
    kept = dict[int, int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        forward(x)
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_the_packed_matrix_alone(kind: str):
    stored, scale = pack(torch.randn(256, 128), kind)
    x = torch.randn(4, 128, requires_grad=True)
    assert kept_bytes(x, lambda x: product(x, stored, scale, torch.float32)) == stored.nbytes + scale.nbytes


# Of the packed model's logits against float32's, and of its matrices' bytes against float32's.
CLOSE = {"int8": (4e-2, 0.27), "nf4": (0.6, 0.14)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", RANDOM_TENSORS)
def test_packed_model_is_close_to_float32_and_small(family: str, kind: str, tmp_path: Path):
    torch.save(RANDOM_TENSORS[family](C=256, ffn=896, vocab=300), tmp_path / "base.pth")
    wide = read_lm(tmp_path / "base.pth", torch.float32)
    narrow = read_lm(tmp_path / "base.pth", torch.bfloat16, quant=kind)
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(4))
    want, got = wide(ids), narrow(ids)
    error, share = CLOSE[kind]
    assert_rms_close("logits", got.logits, want.logits, error)
    assert_rms_close("state", got.state.wkv, want.state.wkv, error)
    matrices = {f"{name}.weight" for name, x in wide.named_modules() if isinstance(x, torch.nn.Linear)}
    named = [dict(model.named_parameters()) for model in (wide, narrow)]
    stored = sum(named[1][name].nbytes + named[1][name.replace("weight", "scale")].nbytes for name in matrices)
    assert stored < share * sum(named[0][name].nbytes for name in matrices)
    floats = {x.dtype for name, x in named[1].items() if name not in matrices and not name.endswith(".scale")}
    assert floats == {torch.bfloat16, *([torch.int8] if kind == "nf4" else [])}  # nf4's embeddings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", RANDOM_TENSORS)
def test_packed_model_computes_as_one_of_the_unpacked_weights(family: str, kind: str, tmp_path: Path):
    """Logits, loss and the gradient of the input, in float32; and steps as a pass over all."""
    tensors = RANDOM_TENSORS[family]()
    torch.save(tensors, tmp_path / "base.pth")
    packed = read_lm(tmp_path / "base.pth", torch.float32, quant=kind)
    for name, module in packed.named_modules():
        if isinstance(module, torch.nn.Linear):
            tensors[f"{name}.weight"] = unpack(module.weight, module.scale, torch.float32)
    if kind == "nf4":
        tensors["emb.weight"] = packed.emb(torch.arange(272))
    torch.save(tensors, tmp_path / "plain.pth")
    plain = read_lm(tmp_path / "plain.pth")
    ids, targets = torch.randint(272, (3, 12)), torch.randint(272, (36,))
    found = []
    for model in (packed, plain):
        x = model.embed(ids).clone().requires_grad_()
        hidden, _ = model.hidden(x, model.zero_state(3))
        loss = model.head(hidden.flatten(0, 1), targets)
        loss.backward()
        state = model.zero_state(3)
        steps = torch.stack([model.step(column, state) for column in ids.T], 1)
        found.append((model(ids).logits, loss.detach(), x.grad, steps, state.wkv))
    for name, *pair in zip(("logits", "loss", "gradient", "steps", "state"), *found, strict=True):
        assert_rms_close(name, *pair, 2e-5)
