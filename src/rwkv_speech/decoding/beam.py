"""Beam search: several texts of one request grow side by side; their states move with them by changing slots."""

# G searches · b beams · S slots · V vocabulary · c candidates

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rwkv_speech.decoding.ctc_prefix import PrefixScorer
from rwkv_speech.decoding.strategy import Choice, Hypothesis, Scores, Strategy, Track

Candidate = tuple[int, Choice]  # the place of the beam, and the token that may follow it

# With a scorer of prefixes, so many tokens behind each text are looked at closely, for each beam.
_LOOKED_AT = 4


@dataclass(eq=False)
class Beam:
    """The search of one request over its `slots`, whose tracks are None until there are so many texts.

    It ends when `beam` x `patience` texts have ended, as in whisper, and at the limit. With a `scorer` the CTC head has
    its say about each token.
    """

    slots: list[int]
    tracks: list[Track | None]
    strategy: Strategy
    finished: list[Hypothesis] = field(default_factory=list)
    scorer: PrefixScorer | None = None

    def advance(self, candidates: Sequence[Candidate]) -> list[tuple[int, int]] | None:
        """Take the candidates, best first; the pairs of slots (from, to) whose state must be copied, None at the end.

        A parent's first child stays in its slot, so that only further ones cost a copy.
        """
        width = len(self.slots)
        most = max(1, round(width * self.strategy.options.patience))
        grown: list[tuple[int, Track]] = []
        full = any(track is not None and track.is_full for track in self.tracks)
        for parent, choice in candidates:
            track = self.tracks[parent]
            if track is None or choice.score == -math.inf or len(grown) == width or len(self.finished) == most:
                continue
            child = track.fork()
            if ended := self.strategy.take(child, choice):
                self.finished += [] if ended.cut else [ended]
            else:
                grown.append((parent, child))
        if full or not grown or len(self.finished) >= most:
            self._end()
            return None
        return self._settle(grown)

    def _settle(self, grown: list[tuple[int, Track]]) -> list[tuple[int, int]]:
        tracks: list[Track | None] = [None] * len(self.slots)
        further = []
        for parent, child in grown:
            if tracks[parent] is None:
                tracks[parent] = child
            else:
                further.append((parent, child))
        free = (place for place, track in enumerate(tracks) if track is None)
        copies = []
        for (parent, child), place in zip(further, free, strict=False):
            tracks[place] = child
            copies.append((self.slots[parent], self.slots[place]))
        self.tracks = tracks
        return copies

    def _end(self) -> None:
        """Fill up with the best of what has not ended."""
        going = sorted((track for track in self.tracks if track), key=lambda track: -track.total)
        missing = max(0, len(self.slots) - len(self.finished))
        penalty = self.strategy.options.length_penalty
        for track in going[:missing]:
            if track.prefix:  # all that the head hears counts, as in the texts that have ended
                track.total += self.strategy.options.ctc_weight * (track.prefix.ended().total - track.prefix.total)
            self.finished.append(track.hypothesis(True, penalty))


def candidates(searches: Sequence[Beam], found: Scores) -> list[list[Candidate]]:
    """The best 2 b next tokens of each search, best first: of these at least b are not the end; `found` by slots."""
    silent = [beam for beam in searches if beam.scorer is None]
    likely = iter(_likely(silent, found) if silent else [])
    return [next(likely) if beam.scorer is None else _heard(beam, beam.scorer, found) for beam in searches]


def _likely(searches: Sequence[Beam], found: Scores) -> list[list[Candidate]]:
    width, V = len(searches[0].slots), found.scores.shape[-1]
    count = min(2 * width, V)
    device = found.scores.device
    slots = torch.tensor([beam.slots for beam in searches], device=device)
    totals = torch.tensor([[t.total if t else -math.inf for t in beam.tracks] for beam in searches], device=device)
    values, tokens = found.scores[slots.flatten()].topk(count)
    sums = values.view(*slots.shape, count) + totals[:, :, None]
    _, order = sums.flatten(1).topk(min(2 * width, width * count), dim=1)
    parents = order // count
    tokens = tokens.view(len(searches), -1).gather(1, order)
    chosen = found.of(slots.gather(1, parents).flatten(), tokens.flatten())
    places = parents.flatten().tolist()
    flat = list(zip(places, chosen, strict=True))
    return [flat[i : i + order.shape[1]] for i in range(0, len(flat), order.shape[1])]


def _heard(beam: Beam, scorer: PrefixScorer, found: Scores) -> list[Candidate]:
    """Of one search, in which the CTC head's log-probability counts, too."""
    width, weight = len(beam.slots), beam.strategy.options.ctc_weight
    texts = [(place, track, track.prefix) for place, track in enumerate(beam.tracks) if track and track.prefix]
    slots = torch.tensor([beam.slots[place] for place, *_ in texts], device=found.scores.device)
    hopes = found.scores[slots] + weight * scorer.hopes([text for *_, text in texts]).to(slots.device)
    tokens = hopes.topk(min(_LOOKED_AT * width, hopes.shape[-1])).indices
    choices = iter(found.of(slots.repeat_interleave(tokens.shape[1]), tokens.flatten()))
    longer = scorer.after([text for *_, text in texts], tokens.tolist())
    every = list[tuple[float, Candidate]]()
    for (place, track, text), row in zip(texts, longer, strict=True):
        for prefix, choice in zip(row, choices, strict=False):  # which go on from text to text
            score = choice.score + weight * (prefix.total - text.total)
            every.append((track.total + score, (place, choice._replace(score=score, prefix=prefix))))
    every.sort(key=lambda one: -one[0])
    return [candidate for _, candidate in every[: 2 * width]]
