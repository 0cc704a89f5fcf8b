"""What hypotheses got wrong, word by word."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rapidfuzz.distance import Levenshtein

from rwkv_speech.decoding.results import Row
from rwkv_speech.text import NORMALIZERS, normalizer

_KINDS = {"equal": "equal", "replace": "sub", "insert": "ins", "delete": "del"}


@dataclass(frozen=True)
class Utterance:
    """One utterance's words as (kind, reference word, hypothesis word), kind one of equal, sub, ins, del."""

    name: str
    words: tuple[tuple[str, str, str], ...]

    @property
    def edits(self) -> int:
        """Words that are wrong, missing or too many."""
        return sum(kind != "equal" for kind, _, _ in self.words)

    @property
    def wer(self) -> float:
        """As a fraction of the reference's words; of 1 where it has none."""
        return self.edits / max(1, sum(kind != "ins" for kind, _, _ in self.words))


def align(rows: Sequence[Row], form: str = NORMALIZERS[0]) -> list[Utterance]:
    """The aligned words of result rows, in a form of text.NORMALIZERS."""
    normalise = normalizer(form)
    return [Utterance(row.id, _words(normalise(row.ref).split(), normalise(row.hyp).split())) for row in rows]


def _words(ref: list[str], hyp: list[str]) -> tuple[tuple[str, str, str], ...]:
    words: list[tuple[str, str, str]] = []
    for run in Levenshtein.opcodes(ref, hyp):
        there, here = ref[run.src_start : run.src_end], hyp[run.dest_start : run.dest_end]
        words += [(_KINDS[run.tag], a, b) for a, b in zip_longest(there, here, fillvalue="")]
    return tuple(words)


def most_frequent(utterances: Sequence[Utterance], kind: str, most: int) -> list[tuple[str, str, int]]:
    """(reference word, hypothesis word, times) of one kind of error; of equal counts in alphabetical order."""
    counts = Counter((ref, hyp) for u in utterances for k, ref, hyp in u.words if k == kind)
    return [(*pair, times) for pair, times in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]
