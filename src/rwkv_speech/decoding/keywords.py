"""Keyword biasing: listed phrases become likelier while a text is made (shallow fusion with an Aho-Corasick trie).

The trie is over the model's tokens. Each token that goes on with a phrase earns the phrase's weight, which is taken
back from a text that leaves the phrase before its end, or goes on with letters behind it: in sum a text has the weight
of each token of each listed phrase that it holds as whole words. arXiv 2508.07014 does the same in greedy and beam
search; the failure links are those of Aho and Corasick (1975).
"""

# B rows · V vocabulary

import unicodedata
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from rwkv_speech.data.phrases import read_phrases
from rwkv_speech.decoding.options import Options
from rwkv_speech.text import UNSPACED
from rwkv_speech.tokenizer import WorldTokenizer

_INSIDE, _START = 0, 1  # nodes: inside a word, and where one may start


@dataclass(slots=True)
class _Node:
    """A place in the trie, reached by the first tokens of a phrase; every value is a sum of weights."""

    fail: int = _INSIDE  # the node of the longest ending of what was read that starts a phrase, too
    following: dict[int, int] = field(default_factory=dict)
    earned: float = 0.0  # so far, by the phrase that weighs most; all is taken back unless it ends here
    closed: float = 0.0  # of phrases that end here as whole words if no letter follows
    kept: float = 0.0  # of those that end here whatever follows: in scripts that write no blanks


@dataclass(frozen=True)
class _Change:
    """What tokens earn behind a node."""

    place: int  # what they earn as a phrase's first is that of _INSIDE or _START
    all: float
    letters: float  # what those that go on with a word earn beside
    tokens: list[tuple[int, float]]  # and those that go on with a phrase


class Keywords:
    """Phrases with weights for a model whose logits have `vocab` entries; nodes are ints, the first one `start`."""

    start = _START

    def __init__(
        self, phrases: Mapping[str, float], tokenizer: WorldTokenizer, vocab: int, device: torch.device | str = "cpu"
    ) -> None:
        texts = [tokenizer.decode([token]) for token in range(vocab)]
        letters = [_is_letter(text[:1]) for text in texts]  # of a token that goes on with a word
        self._opens = [not _is_letter(text[-1:]) for text in texts]  # behind which a word may start
        self._eos = tokenizer.eos_id
        self._nodes = [_Node(), _Node()]
        for phrase, weight in phrases.items():
            self._add(phrase, weight, tokenizer)
        self._link()
        self._changes: dict[int, _Change] = {}
        places = [[self._first_earned(place, token) for token in range(vocab)] for place in (_INSIDE, _START)]
        self._earned = torch.tensor(places, device=device)  # by each token as a phrase's first
        self._letters = torch.tensor(letters, dtype=torch.float32, device=device)

    @classmethod
    def of(
        cls, options: Options, tokenizer: WorldTokenizer, vocab: int, device: torch.device | str
    ) -> "Keywords | None":
        """The keywords that the options ask for, if any; raises UserError as `read_phrases` does."""
        phrases = read_phrases(options)
        return cls(phrases, tokenizer, vocab, device) if phrases else None

    def advance(self, node: int, token: int) -> int:
        """The node behind a token; a text that has ended stays where it is."""
        if token == self._eos:
            return node
        while (found := self._nodes[node].following.get(token)) is None:
            if node == _INSIDE:
                return _START if self._opens[token] else _INSIDE
            node = self._nodes[node].fail
        return found

    def walk(self, tokens: Iterable[int], node: int = _START) -> list[int]:
        """The nodes before each token and behind the last."""
        nodes = [node]
        for token in tokens:
            nodes.append(self.advance(nodes[-1], token))
        return nodes

    def add(self, scores: Tensor, nodes: Sequence[int]) -> Tensor:
        """Logits or log-probabilities (B, V) of the tokens behind B nodes -> the same with what each token changes."""
        changes = [self._changed(node) for node in nodes]
        places = torch.tensor([change.place for change in changes], device=scores.device)
        scores = scores + self._earned[places]
        # Few rows are within a phrase or at the end of one; one copy to the device each.
        if rows := [
            (i, change.all, change.letters) for i, change in enumerate(changes) if change.all or change.letters
        ]:
            within = torch.tensor(rows, device=scores.device)
            scores[within[:, 0].long()] += within[:, 1:2] + within[:, 2:3] * self._letters
        if several := [(i, *pair) for i, change in enumerate(changes) for pair in change.tokens]:
            tokens = torch.tensor(several, device=scores.device)
            scores[tokens[:, 0].long(), tokens[:, 1].long()] += tokens[:, 2]
        return scores

    def _changed(self, node: int) -> _Change:
        if node not in self._changes:
            here, following, at = self._nodes[node], dict[int, int](), node
            while at > _START:
                following = self._nodes[at].following | following
                at = self._nodes[at].fail
            tokens = [(token, self._nodes[n].earned - self._first_earned(at, token)) for token, n in following.items()]
            self._changes[node] = _Change(at, here.kept + here.closed - here.earned, -here.closed, tokens)
        return self._changes[node]

    def _first_earned(self, place: int, token: int) -> float:
        """What a token earns as a phrase's first."""
        found = self._nodes[place].following.get(token) or self._nodes[_INSIDE].following.get(token)
        return self._nodes[found].earned if found else 0.0

    def _add(self, phrase: str, weight: float, tokenizer: WorldTokenizer) -> None:
        """In the case in which it is given, in lower and in upper case: the model writes that of its training."""
        for text in dict.fromkeys((phrase, phrase.lower(), phrase.upper())):
            plain, spaced = tokenizer.encode(text), tokenizer.encode(f" {text}")
            self._add_tokens(plain, weight, _START if _is_letter(text[0]) else _INSIDE, text)
            if spaced[1:] != plain:  # else the first is a blank, behind which the others are found
                self._add_tokens(spaced, weight, _INSIDE, text)

    def _add_tokens(self, tokens: Sequence[int], weight: float, at: int, text: str) -> None:
        for count, token in enumerate(tokens, start=1):
            following = self._nodes[at].following
            if token not in following:
                following[token] = len(self._nodes)
                self._nodes.append(_Node())
            at = following[token]
            self._nodes[at].earned = max(self._nodes[at].earned, weight * count)
        end, most = self._nodes[at], weight * len(tokens)
        if _is_letter(text[-1]):
            end.closed = max(end.closed, most)
        else:
            end.kept = max(end.kept, most)

    def _link(self) -> None:
        """Failure links, shorter prefixes first, and with them the phrases that end with others."""
        queue = deque[int]()
        for place in (_INSIDE, _START):
            for token, child in self._nodes[place].following.items():
                base = _START if self._opens[token] else _INSIDE
                self._nodes[child].fail = self.advance(_INSIDE, token) if place == _START else base
                queue.append(child)
        while queue:
            at = queue.popleft()
            node = self._nodes[at]
            behind = self._nodes[node.fail]
            node.closed, node.kept = node.closed + behind.closed, node.kept + behind.kept
            node.earned = max(node.earned, node.closed + node.kept, behind.earned)
            for token, child in node.following.items():
                self._nodes[child].fail = self.advance(node.fail, token)
                queue.append(child)


@cache
def _is_letter(character: str) -> bool:
    """Whether a phrase beside it would be inside a word; half a character counts as one."""
    if not character or UNSPACED.match(character) or "\uac00" <= character <= "\ud7a3":  # Korean joins its particles
        return False
    return character == "\ufffd" or unicodedata.category(character)[0] in "LMN"
