"""Comparisons that several tests share."""

from torch import Tensor


def rms_error(got: Tensor, want: Tensor) -> float:
    """RMS of the difference as a share of the RMS of `want`; the plain RMS where `want` is all zeros."""
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    scale = want.square().mean().sqrt()
    error = (got - want).square().mean().sqrt()
    return float(error / scale if scale > 0 else error)


def assert_rms_close(name: str, got: Tensor, want: Tensor, tol: float) -> None:
    """Fails unless shapes agree, `got` is finite and the relative RMS error is at most `tol`."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    error = rms_error(got, want)
    assert error <= tol, f"{name}: relative RMS error {error:.2e}, allowed {tol:.0e}"
