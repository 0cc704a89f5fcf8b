"""What hypotheses got wrong, word by word."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import jiwer

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.measure import Measure
from rwkv_speech.scoring.measures import measures
from rwkv_speech.tasks import base_of
from rwkv_speech.text import NORMALIZERS, normalizer

_KINDS = {"equal": "equal", "substitute": "sub", "insert": "ins", "delete": "del"}


@dataclass(frozen=True)
class Utterance:
    """One utterance's words as (kind, reference word, hypothesis word), kind one of equal, sub, ins, del.

    `error` is that of its task's measure, `verdict` what is said of it.
    """

    name: str
    words: tuple[tuple[str, str, str], ...]
    error: float
    verdict: str

    @property
    def edits(self) -> int:
        """Words that are wrong, missing or too many."""
        return sum(kind != "equal" for kind, _, _ in self.words)


def align(
    rows: Sequence[Row], form: str = NORMALIZERS[0], found: Mapping[str, Measure] | None = None
) -> list[Utterance]:
    """The aligned words of result rows, in a form of text.NORMALIZERS; `found` are their measures, if known."""
    if not rows:
        return []
    normalise = normalizer(form)
    refs, hyps = ([" ".join(normalise(getattr(row, name)).split()) for row in rows] for name in ("ref", "hyp"))
    aligned = jiwer.process_words(refs, hyps)
    judged = {
        task: zip(x.errors.tolist(), x.verdicts(), strict=True) for task, x in (found or measures(rows, form)).items()
    }
    return [
        Utterance(row.id, _words(ref, hyp, chunks), *next(judged[base_of(row.task)]))
        for row, ref, hyp, chunks in zip(rows, aligned.references, aligned.hypotheses, aligned.alignments, strict=True)
    ]


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
