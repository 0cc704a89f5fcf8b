"""One matrix with everything that it may have, against the sum written out."""

import pytest
import torch
from assertions import assert_rms_close

from rwkv_speech.models.linear import Embedding, Head, Linear
from rwkv_speech.models.losses import head_loss_sum


def frozen(K: int = 64, M: int = 96, kind: type[Linear] = Linear) -> Linear:
    torch.manual_seed(0)
    return kind(K, M).requires_grad_(False)


def with_update(linear: Linear, dropout: float = 0.0) -> Linear:
    linear.add_lora(4, 6.0, dropout)
    torch.nn.init.normal_(linear.lora_B)
    return linear


@pytest.mark.parametrize("quant", ["", "int8", "nf4"])
def test_update_is_alpha_over_rank_times_b_a(quant: str):
    linear = frozen()
    if quant:
        linear.quantise(quant, torch.float32)
    x = torch.randn(3, 5, 64)
    linear.add_lora(4, 6.0)
    before = linear.dense().double()
    assert_rms_close("at first", linear(x), x.double() @ before.T, 1e-6)
    torch.nn.init.normal_(linear.lora_B)
    given = [x.requires_grad_(), linear.lora_A, linear.lora_B]
    exact = [t.detach().double().requires_grad_() for t in given]
    y, gradient = linear(x), torch.randn(3, 5, 96)
    wanted = exact[0] @ (before + 1.5 * exact[2] @ exact[1]).T
    assert_rms_close("output", y, wanted, 1e-6)
    gradients = torch.autograd.grad(y, given, gradient), torch.autograd.grad(wanted, exact, gradient.double())
    for found, want in zip(*gradients, strict=True):
        assert_rms_close("gradient", found, want, 1e-5)
    linear.merge()
    assert [name for name, _ in linear.named_parameters()] == ["weight"] and not linear.weight.requires_grad
    assert_rms_close("merged", linear(x), wanted, 1e-6)


def test_bfloat16_input_is_answered_in_bfloat16():
    linear = with_update(frozen()).bfloat16()
    linear.lora_A = torch.nn.Parameter(linear.lora_A.float())
    x = torch.randn(7, 64).bfloat16()
    y = linear(x)
    assert y.dtype == torch.bfloat16
    linear.merge()
    assert linear.weight.dtype == torch.bfloat16
    assert_rms_close("merged", linear(x), y, 2e-2)


def test_dropout_is_of_the_update_alone_and_of_training_alone():
    linear, x = with_update(frozen(), dropout=0.5), torch.randn(4, 64)
    with torch.no_grad():
        plain = linear(x)
        assert torch.equal(linear(x), plain)
    torch.manual_seed(1)
    draws = torch.stack([linear(x) for _ in range(4000)])
    assert_rms_close("mean", draws.mean(0), plain, 0.05)
    assert draws.std(0).min() > 0
    linear.lora_scale = 0.0
    assert torch.equal(linear(x), x @ linear.weight.T)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_packed_head_gives_logits_and_their_loss(quant: str):
    head = frozen(64, 300, Head)
    head.quantise(quant, torch.float32)
    hidden, targets = torch.randn(9, 64, requires_grad=True), torch.randint(300, (9,))
    loss, wanted = head(hidden, targets), head_loss_sum(hidden, head.dense(), targets)
    assert_rms_close("logits", head(hidden), hidden @ head.dense().T, 1e-6)
    found, want = (torch.autograd.grad(x, hidden)[0] for x in (loss, wanted))
    assert loss == wanted and torch.equal(found, want) and found.std() > 0


def test_packed_embeddings_are_rows_of_the_unpacked_ones():
    torch.manual_seed(0)
    emb = Embedding(50, 32).requires_grad_(False).bfloat16()
    before = emb.weight.clone()
    emb.quantise()
    found = emb(torch.arange(50).view(5, 10))
    assert found.dtype == torch.bfloat16 and emb.weight.dtype == torch.int8
    assert_rms_close("embeddings", found.view(50, 32), before, 8e-3)
    emb.merge()
    assert torch.equal(emb.weight, found.view(50, 32))
