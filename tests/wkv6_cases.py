"""Inputs of WKV-6, and the comparison of it and WKV-7 with their definitions in float64, for every form."""

# B batch · T time · H heads · N head size

from collections.abc import Callable, Sequence

import torch
from assertions import assert_rms_close
from torch import Tensor

from rwkv_speech.ops.wkv6_ref import wkv6_ref

Operator = Callable[..., tuple[Tensor, Tensor]]
NAMES = ("r", "k", "v", "w", "u", "state")
RESULTS = ("y", "state_out", *(f"d{name}" for name in NAMES))
# One rounding of the result to bfloat16 is 1.7e-3.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-4, torch.bfloat16: 1.9e-3}
# Also for du, of which there is so little that its roundings scatter.
DW_TOLERANCES = TOLERANCES | {torch.float16: 5e-4, torch.bfloat16: 3e-3}
TF32_TOLERANCE = 7e-4
PACKED = [0, 0, 1, 41, 41, 58, 122, 123, 125, 125]


def random_inputs(
    B: int,
    T: int,
    H: int,
    N: int,
    dtype: torch.dtype = torch.float64,
    *,
    sequences: int | None = None,
    device: str = "cpu",
    decay: tuple[float, float] = (-1.5, 1.5),
) -> list[Tensor]:
    """r, k, v, w, u and a non-zero state; the raw decay has this mean and deviation and is at most 8."""
    generator = torch.Generator().manual_seed(1000 * T + 10 * B + H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v = (normal(B, T, H, N) for _ in range(3))
    w = (decay[0] + decay[1] * normal(B, T, H, N)).clamp(max=max(8.0, decay[0]))
    inputs = [r, k, v, w, normal(H, N), normal(sequences or B, H, N, N)]
    return [x.to(device, torch.float32 if x is inputs[5] and dtype != torch.float64 else dtype) for x in inputs]


def run(
    op: Operator, inputs: list[Tensor], cu_seqlens: Tensor | None = None, names: Sequence[str] = NAMES
) -> dict[str, Tensor]:
    """Outputs and gradients for the same gradients of both outputs, whatever the type of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*inputs, cu_seqlens=cu_seqlens)
    generator = torch.Generator().manual_seed(5)
    # Rounded to bfloat16, every type holds the same numbers.
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    # With no tokens the definition's y depends on nothing.
    pairs = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return dict(zip(("y", "state_out", *(f"d{name}" for name in names)), (*outputs, *gradients), strict=True))


def compare(
    op: Operator,
    inputs: list[Tensor],
    bounds: list[int] | None = None,
    form: str = "auto",
    definition: Operator = wkv6_ref,
    names: Sequence[str] = NAMES,
) -> None:
    """`op` on these inputs against the definition on the same numbers in float64."""
    dtype = inputs[0].dtype
    # The tensor cores multiply with 10 bits of mantissa; they serve only these.
    tf32 = form == "tiles" and dtype in (torch.bfloat16, torch.float16) and inputs[0].shape[-1] == 64
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=inputs[0].device)
    got = run(op, inputs, cu_seqlens, names)
    want = run(definition, [x.double() for x in inputs], cu_seqlens, names)
    for name in want:
        in_float32 = dtype != torch.float64 and name in ("state_out", "dstate")
        assert got[name].dtype == (torch.float32 if in_float32 else dtype), name
        tolerances = DW_TOLERANCES if name in ("dw", "du") else TOLERANCES
        tolerance = tolerances[torch.float32 if in_float32 else dtype]
        assert_rms_close(name, got[name], want[name], max(tolerance, TF32_TOLERANCE) if tf32 else tolerance)
