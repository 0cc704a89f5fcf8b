"""How the next token of each text is chosen, and when a text ends."""

# S slots · n some of their rows · V vocabulary

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_speech.decoding.ctc_prefix import Prefix
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.options import Options

# A text that says the same over and over: at least so many times, and so many tokens in all.
_LOOP_TIMES, _LOOP_TOKENS = 4, 32
# What was heard may have so many tokens, however few the answer may have.
_HEARD_TOKENS = 256


@dataclass(frozen=True)
class Hypothesis:
    """A text as tokens `ids`, without the end; log-probabilities and entropies (nats) are of the model itself.

    These are of each token and then of the end, which a text that was `cut` lacks. Hypotheses are ordered by `score`.
    `heard` is what a task that transcribes first has written before the separator, None of other tasks; the text is
    what follows, nothing where there was no separator.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    cut: bool
    score: float = 0.0
    heard: tuple[int, ...] | None = None

    @property
    def avg_logprob(self) -> float:
        """The mean log-probability of the tokens and the end, as in whisper; 0 of nothing at all."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


class Choice(NamedTuple):
    """A token that is taken: what it was chosen by, and the model's log-probability and entropy there.

    `prefix` is the text up to it as the CTC head hears it, where that takes part in a search.
    """

    token: int
    score: float
    logprob: float
    entropy: float
    prefix: Prefix | None = None


@dataclass
class Track:
    """A text in the making: of most `limit` tokens, chosen by chance above `temperature` 0.

    With a `separator` it is what was heard, the first separator and then the answer, which begins at `start`; the limit
    is that of the answer.

    `total` is the sum of what the tokens were chosen by: log-probabilities after penalties, bonuses of its `keywords`,
    and where there is a `prefix`, the CTC head's part. `node` is the place in the keywords' trie.
    """

    limit: int
    temperature: float = 0.0
    chance: random.Random | None = None
    total: float = 0.0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    node: int = Keywords.start
    keywords: Keywords | None = None
    prefix: Prefix | None = None
    separator: int | None = None
    start: int = 0

    def fork(self) -> "Track":
        """A copy that goes its own way."""
        return replace(self, ids=[*self.ids], logprobs=[*self.logprobs], entropies=[*self.entropies])

    def append(self, choice: Choice) -> None:
        """Take the next token, the end of text among them."""
        self.ids.append(choice.token)
        self.total += choice.score
        self.logprobs.append(choice.logprob)
        self.entropies.append(choice.entropy)
        self.prefix = choice.prefix
        if choice.token == self.separator and not self.start:
            self.start = len(self.ids)

    @property
    def answer(self) -> list[int]:
        """The text so far, without what was heard."""
        return self.ids[self.start :] if self.start or self.separator is None else []

    @property
    def is_full(self) -> bool:
        """Whether no more tokens may come: the limit is reached, or the text repeats itself endlessly."""
        is_answer = self.start or self.separator is None
        limit = self.limit if is_answer else max(self.limit, _HEARD_TOKENS)
        return len(self.ids) - self.start >= limit or is_loop(self.ids)

    def hypothesis(self, cut: bool, length_penalty: float | None) -> Hypothesis:
        """The text so far; the last token is the end unless it is cut.

        The score is the total divided by the length, the end counted, or by whisper's ((5 + length) / 6)^alpha, alpha
        being `length_penalty` (Wu et al. 2016, arXiv:1609.08144).
        """
        length = max(1, len(self.ids))
        divisor = length if length_penalty is None else ((5 + length) / 6) ** length_penalty
        ids = tuple(self.ids if cut else self.ids[:-1])
        start, heard = self.start, None
        if self.separator is not None:
            start = self.start or len(ids)
            heard = ids[: self.start - 1] if self.start else ids
        known = tuple(self.logprobs[start:]), tuple(self.entropies[start:])
        return Hypothesis(ids[start:], *known, cut, self.total / divisor, heard)


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


class Scores(NamedTuple):
    """Of the next token of n texts: what it is chosen by, the model's own log-probability (n, V each), the entropy."""

    scores: Tensor
    logprobs: Tensor
    entropies: Tensor  # (n,)

    def of(self, rows: Tensor, tokens: Tensor) -> list[Choice]:
        """What is known of some tokens, rows and tokens (c,)."""
        known = self.scores[rows, tokens], self.logprobs[rows, tokens], self.entropies[rows]
        # One copy to the host; token ids are exact in float32.
        table = torch.stack((tokens.float(), *known), 1).tolist()
        return [Choice(int(token), *numbers) for token, *numbers in table]


def measured(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, V) -> log-probabilities (n, V) and the entropy of each row in nats (n,), float32."""
    logprobs = torch.log_softmax(logits.float(), -1)
    return logprobs, -(logprobs.exp() * logprobs).sum(-1)


class Strategy:
    """How tokens are chosen: by the options' penalties, a text's keywords, and chance above temperature 0."""

    def __init__(self, options: Options, eos: int) -> None:
        self.options, self.eos = options, eos
        penalties = (options.presence_penalty, options.frequency_penalty, options.no_repeat_ngram_size)
        self._penalises = any(penalties) or options.repetition_penalty != 1

    def scores(self, logits: Tensor, tracks: Sequence[Track | None]) -> Scores:
        """Of the token that may follow each of n texts, from its logits (n, V); what has no track means nothing."""
        logprobs, entropies = measured(logits)
        scores = logprobs
        if self._penalises:
            texts = [track.ids[track.start :] if track else [] for track in tracks]
            scores = torch.log_softmax(penalised(logits.float(), texts, self.options), -1)
        listed = dict[Keywords, list[int]]()
        for row, track in enumerate(tracks):
            if track and track.keywords:
                listed.setdefault(track.keywords, []).append(row)
        if listed:
            scores = scores.clone()
        for keywords, rows in listed.items():
            scores[rows] = keywords.add(scores[rows], [track.node for row in rows if (track := tracks[row])])
        return Scores(scores, logprobs, entropies)

    def choose(self, found: Scores, tracks: Sequence[Track | None]) -> list[Choice]:
        """A token for each row; those without a track mean nothing."""
        tokens = found.scores.argmax(-1)
        drawn = [(row, track, track.chance.random()) for row, track in enumerate(tracks) if track and track.chance]
        if drawn:
            rows = torch.tensor([row for row, *_ in drawn], device=tokens.device)
            temperatures = torch.tensor([track.temperature for _, track, _ in drawn], device=tokens.device)
            places = torch.tensor([place for *_, place in drawn], dtype=torch.float64, device=tokens.device)
            top = self.options.top_k, self.options.top_p
            tokens[rows] = sample(found.scores[rows], temperatures, places, *top)
        return found.of(torch.arange(len(tokens), device=tokens.device), tokens)

    def take(self, track: Track, choice: Choice) -> Hypothesis | None:
        """Append the next token to a text: the text, if it ends with that, or for want of room without it."""
        if choice.token != self.eos and track.is_full:
            return track.hypothesis(True, self.options.length_penalty)
        self._append(track, choice)
        return track.hypothesis(False, self.options.length_penalty) if choice.token == self.eos else None

    def _append(self, track: Track, choice: Choice) -> None:
        track.append(choice)
        if track.keywords:
            track.node = track.keywords.advance(track.node, choice.token)

    def verify(self, logits: Tensor, track: Track, draft: Sequence[int]) -> list[Choice]:
        """The best token after a text, and after it and each beginning of a draft, from their logits (T, V)."""
        tracks = [track] * len(logits)
        if self._penalises or track.keywords:
            for row in range(1, len(tracks)):
                tracks[row] = tracks[row - 1].fork()
                self._append(tracks[row], Choice(draft[row - 1], 0.0, 0.0, 0.0))
        return self.choose(self.scores(logits, tracks), [None] * len(tracks))


def penalised(logits: Tensor, texts: Sequence[Sequence[int]], options: Options) -> Tensor:
    """Logits (n, V) float32 with the penalties of what each of the n texts holds so far; prompts do not count.

    repetition_penalty r: a logit of a token that has come is divided by r if positive, else multiplied with it (CTRL,
    arXiv:1909.05858, as in Hugging Face's RepetitionPenaltyLogitsProcessor). Then OpenAI's presence_penalty and
    frequency_penalty: logit - presence * (count > 0) - frequency * count. no_repeat_ngram_size n: a token that
    would complete an n-gram that the text has already gets -inf (Hugging Face's NoRepeatNGramLogitsProcessor).
    """
    logits = logits.clone()
    for row, ids in zip(logits, texts, strict=True):
        if not ids:
            continue
        counts = Counter(ids)
        tokens = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device)
        found = row[tokens]
        found = torch.where(found > 0, found / options.repetition_penalty, found * options.repetition_penalty)
        row[tokens] = found - options.presence_penalty - options.frequency_penalty * times
        if banned := _completions(ids, options.no_repeat_ngram_size):
            row[torch.tensor(banned, device=row.device)] = -torch.inf
    return logits


def _completions(ids: Sequence[int], n: int) -> list[int]:
    """The tokens that have followed the last n - 1 ids before."""
    if not 0 < n <= len(ids):
        return []
    last = ids[len(ids) - n + 1 :]
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last]


def sample(scores: Tensor, temperatures: Tensor, draws: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """A token of each row (n,), from scores (n, V), temperatures above 0 (n,) and `draws` (n,) in [0, 1), float64.

    In Hugging Face's order: temperature; then the `top_k` best, 0 being all; then, renormalised, the fewest of the best
    that hold at least `top_p` of the probability. What is drawn is the place on the cumulative distribution: the same
    number gives the same token in any batch.
    """
    scores = scores.double() / temperatures[:, None]
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        probabilities, order = torch.sort(scores.softmax(-1), dim=-1, descending=True, stable=True)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # what comes before is enough already
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    cumulative = scores.softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
