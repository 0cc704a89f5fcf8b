"""Greedy decoding from the recurrent state: the prefix is read once, each token costs one step."""

# B sequences still running · V vocabulary

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.state import State


@torch.no_grad()
def greedy(
    lm: RWKV6, logits: Tensor, state: State, max_new_tokens: Sequence[int], eos: int
) -> tuple[list[list[int]], list[bool]]:
    """Continue B sequences from their states and the logits (B, V) of their first tokens.

    Returns each sequence's ids without `eos`, and whether it was cut off at its own `max_new_tokens`.
    A sequence that has ended leaves the batch, so it costs nothing more.
    """
    ids: list[list[int]] = [[] for _ in max_new_tokens]
    cut = [False] * len(ids)
    rows = list(range(len(ids)))
    while rows:
        tokens = logits.argmax(-1)
        kept = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token == eos:
                continue
            if len(ids[row]) >= max_new_tokens[row]:
                cut[row] = True
                continue
            ids[row].append(token)
            kept.append(place)
        rows = [rows[place] for place in kept]
        if not rows:
            break
        if len(kept) < len(tokens):
            places = torch.tensor(kept, device=tokens.device)
            tokens, state = tokens[places], state.select(places)
        output = lm(input_ids=tokens[:, None], state=state)
        logits, state = output.logits[:, 0], output.state
    return ids, cut
