"""Greedy decoding from the recurrent state: the prefix is read once, each token costs one step of every slot."""

# B slots · V vocabulary

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.state import State


@torch.no_grad()
def greedy(
    lm: RWKV6, logits: Tensor, state: State, max_new_tokens: Sequence[int], eos: int
) -> tuple[list[list[int]], list[bool]]:
    """Decode B sequences from their states, which it overwrites, and the logits (B, V) of their first tokens.

    Returns each sequence's ids without `eos`, and whether it was cut off at its own `max_new_tokens`.
    """
    ids: list[list[int]] = [[] for _ in max_new_tokens]
    cut = [False] * len(ids)
    slots: list[int | None] = list(range(len(ids)))  # the sequence of each slot, None once it has ended
    while True:
        tokens = logits.argmax(-1)
        for slot, token in enumerate(tokens.tolist()):
            row = slots[slot]
            if row is None:
                continue
            if token == eos or len(ids[row]) >= max_new_tokens[row]:
                cut[row] = token != eos
                slots[slot] = None
            else:
                ids[row].append(token)
        running = [slot for slot, row in enumerate(slots) if row is not None]
        if not running:
            return ids, cut
        # To copy the states of the others costs about as much as a step: not for one slot, but for half of them.
        if 2 * len(running) <= len(slots):
            places = torch.tensor(running, device=tokens.device)
            tokens, state, slots = tokens[places], state.select(places), [slots[slot] for slot in running]
        logits = lm.step(tokens, state)
