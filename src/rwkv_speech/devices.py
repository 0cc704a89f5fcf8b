"""Where and in which types a model computes."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Compute:
    """How a model computes: its device, the types of the frozen parts, the form of the WKV-6 kernel.

    `wkv6` is one of config.KERNEL_FORMS; with `fuse`, torch.compile fuses the language model's elementwise parts.
    """

    device: str | torch.device = "cpu"
    lm_dtype: torch.dtype = torch.float32
    encoder_dtype: torch.dtype = torch.float32
    wkv6: str = "auto"
    fuse: bool = False
