"""From flags to devices and number types: where a run computes, and in what precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rwkv_speech.config import ModelConfig, TrainConfig
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
    # Beside packed matrices, decoding on a CPU keeps the rest in bfloat16, too.
    lm_bf16 = bf16 or (bool(config.quant) and not isinstance(config, TrainConfig))
    encoder_bf16 = config.encoder_precision == "bf16" if config.encoder_quant == "" else bf16
    return Compute(
        torch_device(config) if device is None else device,
        torch.bfloat16 if lm_bf16 else torch.float32,
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
    return config.precision == "bf16" or (config.precision != "fp32" and accelerator(config)[0] == "gpu")


class _MetaAutocast(TorchFunctionMode):
    """Autocast's casts on a GPU, as far as the models here meet them: products in bfloat16, norms in float32."""

    _DTYPES = dict.fromkeys(
        (F.linear, F.conv1d, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm), torch.bfloat16
    ) | dict.fromkeys((F.layer_norm, F.group_norm), torch.float32)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if dtype := self._DTYPES.get(func):
            args, kwargs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
            )
        return func(*args, **(kwargs or {}))


def autocast(device_type: str, enabled: bool) -> AbstractContextManager[Any]:
    """torch.autocast to bfloat16, also on the "meta" device, which PyTorch's own does not know.

    On "meta", `enabled=False` does not suspend one that is around it.
    """
    if device_type == "meta":
        return _MetaAutocast() if enabled else nullcontext()
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)
