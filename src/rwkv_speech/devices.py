"""From flags to devices and number types: where a run computes, and in what precision."""

from dataclasses import dataclass

import torch

from rwkv_speech.config import ModelConfig
from rwkv_speech.errors import UserError


@dataclass(frozen=True)
class Compute:
    """How a model computes: where, the types of its frozen parts' weights, the kernel's form (config.KERNEL_FORMS), and
    whether the language model's elementwise parts are fused.
    """

    device: str | torch.device = "cpu"
    lm_dtype: torch.dtype = torch.float32
    encoder_dtype: torch.dtype = torch.float32
    wkv6: str = "auto"
    fuse: bool = False


def compute_of(config: ModelConfig, device: str | torch.device | None = None) -> Compute:
    """What the flags ask for, on `device` if it is given; raises UserError as `accelerator` does."""
    bf16 = uses_bf16(config)
    encoder_bf16 = bf16 if config.encoder_precision == "auto" else config.encoder_precision == "bf16"
    return Compute(
        torch_device(config) if device is None else device,
        torch.bfloat16 if bf16 else torch.float32,
        torch.bfloat16 if encoder_bf16 else torch.float32,
        config.wkv6,
        bool(getattr(config, "compile", False)),
    )


def accelerator(config: ModelConfig) -> tuple[str, int]:
    """("cpu" or "gpu", how many); raises UserError if the machine has fewer GPUs, unless the run is only planned."""
    here = torch.cuda.device_count()
    name, _, count = config.device.partition(":")
    if name == "cpu" or (name == "auto" and not here):
        return "cpu", int(count or 1)
    wanted = 1 if name in ("auto", "cuda") else int(name)
    if wanted > here and not getattr(config, "plan", False):
        raise UserError(
            f"--device: asked for {wanted} GPU(s), found {here}; give a smaller number, or cpu to run without"
        )
    return "gpu", wanted


def torch_device(config: ModelConfig) -> torch.device:
    """The one device of evaluation and prediction; raises UserError as `accelerator` does."""
    return torch.device("cuda" if accelerator(config)[0] == "gpu" else "cpu")


def uses_bf16(config: ModelConfig) -> bool:
    """Whether the language model computes in bfloat16."""
    return config.precision == "bf16" or (config.precision == "auto" and accelerator(config)[0] == "gpu")
