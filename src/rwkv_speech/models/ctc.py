"""The CTC head: characters from the frozen encoder's frames, and the frames at which those of a text are heard."""

# B batch · F frames · D encoder width · K labels, of which 0 is the blank · U characters

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_speech.audio import length_mask
from rwkv_speech.devices import autocast

BLANK = 0
HIDDEN, LAYERS, KERNEL = 256, 2, 5
_DROPOUT = 0.1


@dataclass(frozen=True)
class CtcSpec:
    """What a head is, but for its weights: character i of `labels` is label i + 1.

    A character is heard near its frame, not at it: `start_shift` and `end_shift` (s) lead from the middle of the frame
    of a word's first and last character to where the word starts and ends, as measured on training speech.
    """

    labels: str
    hidden: int = HIDDEN
    kernel: int = KERNEL
    layers: int = LAYERS
    start_shift: float = 0.0
    end_shift: float = 0.0

    @property
    def star(self) -> int:
        """The label of characters that have none: in an alignment it is any label but the blank."""
        return len(self.labels) + 1

    def encode(self, text: str) -> list[int]:
        """The label of each character, in its other case where it has none in its own, else the star."""
        known = self._known
        return [known.get(c) or known.get(c.lower()) or known.get(c.upper()) or self.star for c in text]

    @cached_property
    def _known(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.labels, start=1)}

    def text(self, log_probs: Tensor) -> str:
        """The likeliest path through log-probabilities (F, K) as text."""
        best = torch.unique_consecutive(log_probs.argmax(-1)).tolist()
        # The blank between words may be heard twice, with a pause between.
        return " ".join("".join(self.labels[label - 1] for label in best if label != BLANK).split())


class CtcHead(nn.Module):
    """A few residual convolutions over the frames, and a log-probability of each label in each frame.

    Sources: connectionist temporal classification, Graves et al. 2006; layers that are normalised first, Xiong et al.
    2020.
    """

    def __init__(self, D: int, spec: CtcSpec) -> None:
        super().__init__()
        self.spec = spec
        for number in range(spec.layers):
            width = spec.hidden if number else D
            self.add_module(f"conv{number + 1}", nn.Conv1d(width, spec.hidden, spec.kernel, padding=spec.kernel // 2))
        self.norms = nn.ModuleList(nn.LayerNorm(spec.hidden) for _ in range(spec.layers))
        self.out = nn.Linear(spec.hidden, len(spec.labels) + 1)

    def forward(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """frames (B, F, D), lengths (B,) -> log-probabilities (B, F, K), float32; past a length they mean nothing."""
        outside = ~length_mask(frame_lengths, frames.shape[1], frames.device)[..., None]
        with autocast(frames.device.type, enabled=False):
            x = F.layer_norm(frames.float(), frames.shape[-1:])
            summed = torch.zeros((), device=frames.device)
            for conv, norm in zip(self._convolutions, self.norms, strict=True):
                x = F.dropout(x.masked_fill(outside, 0.0), _DROPOUT, self.training)
                summed = summed + F.gelu(_convolved(x, conv))
                x = norm(summed)
            return self.out(x).log_softmax(-1)

    @property
    def _convolutions(self) -> list[nn.Conv1d]:
        return [cast(nn.Conv1d, self.get_submodule(f"conv{number + 1}")) for number in range(self.spec.layers)]

    def is_like(self, spec: CtcSpec, tensors: Mapping[str, Tensor]) -> bool:
        """Whether it has this record and these weights, to the bit."""
        own = self.state_dict()
        same = self.spec == spec and own.keys() == tensors.keys()
        return same and all(torch.equal(x.cpu(), tensors[name].cpu()) for name, x in own.items())

    def texts(self, frames: Tensor, frame_lengths: Tensor) -> list[str]:
        """What the encoder alone hears in frames (B, F, D)."""
        log_probs = self(frames, frame_lengths).cpu()
        return [self.spec.text(rows[:length]) for rows, length in zip(log_probs, frame_lengths.tolist(), strict=True)]


def _convolved(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """The convolution of x (B, F, D) as a matrix product: a CPU's convolution is prepared anew for every length, which
    takes its gradient eight times as long."""
    half = conv.kernel_size[0] // 2
    windows = F.pad(x, (0, 0, half, half)).unfold(1, conv.kernel_size[0], 1)
    return F.linear(windows.flatten(2), conv.weight.flatten(1), conv.bias)


def align(log_probs: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.int64] | None:
    """The first and the last frame of each target, (U, 2), on the likeliest path through log-probabilities (F, K).

    The target K is the star, which matches whatever is not the blank. None where no path has so many targets.
    Source: the Viterbi path through the states of Graves et al. 2006, a blank around each target.
    """
    num_frames, num_labels = log_probs.shape
    labels = np.zeros(2 * len(targets) + 1, np.int64)
    labels[1::2] = targets
    emit = log_probs.astype(np.float64)
    if num_labels in labels:
        emit = np.concatenate([emit, np.log(-np.expm1(np.minimum(emit[:, :1], -1e-12)))], 1)
    emit = emit[:, labels]
    # From a target straight to the next one, unless they are alike; a path starts in the first blank or target.
    skip = np.full(len(labels), -np.inf)
    skip[1:2] = 0.0
    skip[2:][(labels[2:] != BLANK) & (labels[2:] != labels[:-2])] = 0.0
    # State s is column s + 2, so that what comes from before the first state comes from nowhere; but for the start.
    best = np.full((num_frames + 1, len(labels) + 2), -np.inf)
    best[0, 1] = 0.0
    for t in range(num_frames):
        before, now = best[t], best[t + 1, 2:]
        np.add(before[:-2], skip, out=now)
        np.maximum(now, before[1:-1], out=now)
        np.maximum(now, before[2:], out=now)
        np.add(now, emit[t], out=now)
    return _path_back(best[1:, 2:], skip, len(targets))


def _path_back(best: NDArray[np.float64], skip: NDArray[np.float64], num_targets: int) -> NDArray[np.int64] | None:
    """The frames of each target on the path to the better of the two last states."""
    found = np.zeros((num_targets, 2), np.int64)
    found[:, 0] = len(best)
    if not num_targets:
        return found
    state = len(skip) - 1 - int(len(best) > 0 and best[-1, -2] >= best[-1, -1])
    if not len(best) or best[-1, state] == -np.inf:
        return None
    for t in range(len(best) - 1, -1, -1):
        if state % 2:
            span = found[state // 2]
            span[0] = t
            span[1] = max(span[1], t)
        if t:
            row = best[t - 1]
            moves = [row[state], row[state - 1] if state else -np.inf]
            moves += [row[state - 2] + skip[state]] if state > 1 else []
            state -= moves.index(max(moves))
    return found
