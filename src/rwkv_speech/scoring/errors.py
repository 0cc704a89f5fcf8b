"""What hypotheses got wrong, word by word."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import jiwer

from rwkv_speech.decoding.results import Row
from rwkv_speech.text import NORMALIZERS, normalizer

_KINDS = {"equal": "equal", "substitute": "sub", "insert": "ins", "delete": "del"}


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
    def ref_length(self) -> int:
        """Words of the reference."""
        return sum(kind != "ins" for kind, _, _ in self.words)

    @property
    def wer(self) -> float:
        """As a fraction of the reference's words; of 1 where it has none."""
        return self.edits / max(1, self.ref_length)


def align(rows: Sequence[Row], form: str = NORMALIZERS[0]) -> list[Utterance]:
    """The aligned words of result rows, in a form of text.NORMALIZERS."""
    if not rows:
        return []
    normalise = normalizer(form)
    refs, hyps = ([" ".join(normalise(getattr(row, name)).split()) for row in rows] for name in ("ref", "hyp"))
    found = jiwer.process_words(refs, hyps)
    aligned = zip(rows, found.references, found.hypotheses, found.alignments, strict=True)
    return [Utterance(row.id, _words(ref, hyp, chunks)) for row, ref, hyp, chunks in aligned]


def _words(ref: list[str], hyp: list[str], chunks: list[jiwer.AlignmentChunk]) -> tuple[tuple[str, str, str], ...]:
    words: list[tuple[str, str, str]] = []
    for chunk in chunks:
        there, here = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        words += [(_KINDS[chunk.type], a, b) for a, b in zip_longest(there, here, fillvalue="")]
    return tuple(words)


def most_frequent(utterances: Sequence[Utterance], kind: str, most: int) -> list[tuple[str, str, int]]:
    """(reference word, hypothesis word, times) of one kind of error; of equal counts in alphabetical order."""
    counts = Counter((ref, hyp) for u in utterances for k, ref, hyp in u.words if k == kind)
    return [(*pair, times) for pair, times in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]
