"""The trained bridge from encoder frames to language-model embeddings."""

# B batch · F frames · A audio tokens · D encoder width · C language-model channels

import torch
from torch import Tensor, nn

HIDDEN = 2048


class Adapter(nn.Sequential):
    """Stacks `stack` frames into one audio token and maps it to C channels: Linear, ReLU, Linear.

    With D = 0, where nothing is heard, it has no parameters. Source: SLAM-ASR, Ma et al. 2024 (arXiv:2402.08846).
    Parameter names are those of the published files.
    """

    def __init__(self, D: int, C: int, stack: int = 5, hidden: int = HIDDEN) -> None:
        super().__init__(*([nn.Linear(D * stack, hidden), nn.ReLU(), nn.Linear(hidden, C)] if D else []))
        self.stack = stack

    def forward(  # type: ignore[override] # Sequential for the names of its parameters
        self, frames: Tensor, frame_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """frames (B, F, D), lengths (B,) -> packed audio tokens (sum of A, C) and A of each, (B,).

        The lengths are best on the host: the device is not waited for.
        """
        lengths = frame_lengths // self.stack
        B, F, D = frames.shape
        longest = F // self.stack
        stacked = frames[:, : longest * self.stack].reshape(B, longest, D * self.stack)
        inside = torch.arange(longest, device=lengths.device)[None] < lengths[:, None]
        positions = inside.flatten().nonzero()[:, 0].to(frames.device, non_blocking=True)
        return super().forward(stacked.flatten(0, 1)[positions]), lengths
