"""What the frozen language model says to texts, with no audio and no learned state."""

# S slots · n tokens of a step · V vocabulary

import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from rwkv_speech.batch import BETWEEN_TURNS
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.strategy import Strategy, Track
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.tokenizer import WorldTokenizer


class Answer(NamedTuple):
    """The text that follows prompt `number`, up to an empty line or the end of text; `cut`: at the limit before that.

    Blanks are as the model wrote them.
    """

    number: int
    text: str
    cut: bool


@torch.no_grad()
def answers(
    lm: RWKV, tokenizer: WorldTokenizer, prompts: Iterable[str], options: Options, slots: int, seed: int = 0
) -> Iterator[Answer]:
    """An answer of at most `options.max_new_tokens` tokens to each prompt, as they end, S = `slots` at a time.

    At the first of the options' temperatures, above 0 by chance. An answer depends on its prompt and the seed alone.
    """
    assert options.max_new_tokens
    (temperature, *_), waiting = options.temperatures, enumerate(prompts)
    strategy, state = Strategy(options, tokenizer.eos_id), lm.zero_state(slots)
    tracks: list[Track | None] = [None] * slots
    numbers, unread = [0] * slots, [list[int]()] * slots
    while True:
        for row in (row for row, track in enumerate(tracks) if track is None):
            if (found := next(waiting, None)) is None:
                break
            numbers[row], unread[row] = found[0], tokenizer.encode(found[1])
            chance = random.Random(f"{seed} {found[1]}") if temperature else None
            tracks[row] = Track(options.max_new_tokens, temperature, chance)
            for part in state:
                part[:, row] = 0
        busy = [(row, track) for row, track in enumerate(tracks) if track]
        if not busy:
            return
        # One pass reads the new prompts and the last token of each answer.
        counts = torch.tensor([len(unread[row]) for row, _ in busy])
        tokens = torch.tensor([token for row, _ in busy for token in unread[row]])
        rows = torch.tensor([row for row, _ in busy]).repeat_interleave(counts)
        device = state.wkv.device
        logits = lm.step(tokens.to(device), state, rows.to(device))[(counts.cumsum(0) - 1).to(device)]
        going = [track for _, track in busy]
        for (row, track), choice in zip(busy, strategy.choose(strategy.scores(logits, going), going), strict=True):
            ended = strategy.take(track, choice)
            said, end, _ = tokenizer.decode_bytes(track.ids).partition(BETWEEN_TURNS.encode())
            unread[row] = [choice.token]
            if ended or end:
                tracks[row] = None
                yield Answer(numbers[row], said.decode("utf-8", "ignore"), bool(ended and ended.cut and not end))
