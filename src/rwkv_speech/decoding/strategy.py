"""How the next token of each text is chosen, and when a text ends."""

# S slots · V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A text that says the same over and over: at least so many times, and so many tokens in all.
_LOOP_TIMES, _LOOP_TOKENS = 4, 32


@dataclass(frozen=True)
class Hypothesis:
    """A text as tokens `ids`, without the end; log-probabilities and entropies (nats) are of the model itself.

    These are of each token and then of the end, which a text that was `cut` lacks.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    cut: bool

    @property
    def avg_logprob(self) -> float:
        """The mean log-probability of the tokens and the end, as in whisper; 0 of nothing at all."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


@dataclass
class Track:
    """A text in the making."""

    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def append(self, token: int, logprob: float, entropy: float, eos: int) -> Hypothesis | None:
        """Take the next token; the text, if it has ended."""
        if token != eos and len(self.ids) >= self.limit:
            return self.hypothesis(cut=True)
        self.logprobs.append(logprob)
        self.entropies.append(entropy)
        if token == eos:
            return self.hypothesis(cut=False)
        self.ids.append(token)
        return self.hypothesis(cut=True) if is_loop(self.ids) else None

    def hypothesis(self, cut: bool) -> Hypothesis:
        """What there is."""
        return Hypothesis(tuple(self.ids), tuple(self.logprobs), tuple(self.entropies), cut)


def measured(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (S, V) -> log-probabilities (S, V) and the entropy of each row in nats (S,), float32."""
    logprobs = torch.log_softmax(logits.float(), -1)
    return logprobs, -(logprobs.exp() * logprobs).sum(-1)


def is_loop(ids: Sequence[int]) -> bool:
    """Whether the ids end in one n-gram again and again: 4 times at least, and 32 tokens in all."""
    length = len(ids)
    if length % 8 or length < _LOOP_TOKENS:  # found a few tokens later is early enough
        return False
    for n in range(1, length // _LOOP_TIMES + 1):
        tail = ids[-max(_LOOP_TIMES * n, _LOOP_TOKENS) :]
        if tail[n:] == tail[:-n]:
            return True
    return False
