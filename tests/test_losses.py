import torch
from torch.nn import functional as F

from rwkv_speech.losses import token_loss_sum


def test_token_loss_sum_equals_float64():
    draw = torch.Generator().manual_seed(0)
    logits, targets = 5 * torch.randn(40, 300, generator=draw), torch.randint(300, (40,), generator=draw)
    exact = F.cross_entropy(logits.double(), targets, reduction="sum")
    loss = token_loss_sum(logits, targets)
    assert loss.dtype == torch.float32 and abs(loss.item() - exact.item()) < 1e-6 * exact.item()


def test_token_loss_sum_of_bfloat16_logits_is_computed_in_float32():
    draw = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(40, 300, generator=draw)).bfloat16()
    targets = torch.randint(300, (40,), generator=draw)
    exact = F.cross_entropy(logits.double(), targets, reduction="sum").item()
    loss = token_loss_sum(logits, targets)
    assert loss.dtype == torch.float32 and abs(loss.item() - exact) < 1e-6 * exact
    # The control: left in bfloat16 it would be off by far more.
    assert abs(F.cross_entropy(logits, targets, reduction="sum").item() - exact) > 1e-4 * exact


def test_token_loss_sum_adds_over_parts():
    draw = torch.Generator().manual_seed(2)
    logits, targets = torch.randn(7, 11, generator=draw), torch.randint(11, (7,), generator=draw)
    parts = token_loss_sum(logits[:3], targets[:3]) + token_loss_sum(logits[3:], targets[3:])
    torch.testing.assert_close(token_loss_sum(logits, targets), parts)
    assert token_loss_sum(logits[:0], targets[:0]).item() == 0
