"""The training loss."""

from torch import Tensor
from torch.nn import functional as F


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over n target tokens, in float32; logits (n, V), targets (n,).

    A sum, not a mean: only the caller knows how many target tokens the whole global batch has.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")
