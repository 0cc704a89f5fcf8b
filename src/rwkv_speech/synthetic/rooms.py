"""Makes clean synthetic speech sound as if it came from many rooms, microphones and telephone lines."""

import math

import torch

from rwkv_speech.audio import SAMPLE_RATE


def _curves(batch: int, bins: int, spread_db: float, g: torch.Generator) -> torch.Tensor:
    """(batch, bins) smooth random gains over frequency, normal in decibels at ten points."""
    points = torch.randn(batch, 1, 10, generator=g) * spread_db
    decibel = torch.nn.functional.interpolate(points, size=bins, mode="linear", align_corners=True)[:, 0]
    return 10.0 ** (decibel / 20.0)


def _rooms(batch: int, size: int, strength: float, g: torch.Generator) -> torch.Tensor:
    """(batch, size) room impulse responses: a direct path and a decaying tail of noise; half of them without a tail."""
    time = torch.arange(size) / SAMPLE_RATE
    reverb_seconds = 0.05 + 0.4 * torch.rand(batch, 1, generator=g)
    tail = torch.randn(batch, size, generator=g) * torch.exp(-6.9 * time / reverb_seconds) * (time > 0.002)
    tail = tail / tail.norm(dim=1, keepdim=True).clamp_min(1e-6)
    wet = torch.rand(batch, 1, generator=g) * (torch.rand(batch, 1, generator=g) < 0.5)
    response = strength * tail * wet
    response[:, 0] = 1.0
    return response


def augment(waveforms: torch.Tensor, g: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """(B, S) -> (B, S): random room, equaliser, coloured noise at 3 to 40 dB, and for half of them a telephone band.

    `strength` from 0 to 1 scales all of it; at 0 only noise at 40 dB is left.
    """
    batch, size = waveforms.shape
    room = int(0.4 * SAMPLE_RATE)
    n = 1 << math.ceil(math.log2(size + room))
    bins = n // 2 + 1
    speech = torch.fft.rfft(waveforms, n) * torch.fft.rfft(_rooms(batch, room, strength, g), n)
    speech = speech * _curves(batch, bins, 5.0 * strength, g)
    noise = torch.fft.rfft(torch.randn(batch, size, generator=g), n) * _curves(batch, bins, 12.0, g)
    snr = 40.0 - 37.0 * strength * torch.rand(batch, 1, generator=g)
    noise = noise * (speech.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)) * 10.0 ** (-snr / 20.0)
    hertz = torch.linspace(0, SAMPLE_RATE / 2, bins)
    telephone = torch.rand(batch, 1, generator=g) < 0.5 * strength
    top = torch.where(telephone, 3400.0 + 600.0 * torch.rand(batch, 1, generator=g), 2.0 * SAMPLE_RATE)
    bottom = 250.0 * strength * torch.rand(batch, 1, generator=g)
    band = torch.sigmoid((top - hertz) / 50.0) * torch.sigmoid((hertz - bottom) / 25.0)
    return torch.fft.irfft((speech + noise) * band, n)[:, :size]
