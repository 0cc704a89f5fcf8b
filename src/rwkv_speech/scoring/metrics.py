"""Word and character error rates: what was counted, over a corpus or a part of it."""

# U utterances

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
from numpy.typing import NDArray

from rwkv_speech.decoding.results import Row
from rwkv_speech.errors import UserError
from rwkv_speech.text import NORMALIZERS, normalizer

Longs = NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Words, or characters, that were right, substituted, inserted and deleted."""

    hits: int
    substitutions: int
    insertions: int
    deletions: int

    @property
    def ref_length(self) -> int:
        """How many the references have."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Edits as a fraction of the references' words (0.05 is 5 %); of 1 where they have none, as jiwer does."""
        return (self.substitutions + self.insertions + self.deletions) / max(1, self.ref_length)


@dataclass(frozen=True)
class Scores:
    """What was counted over a corpus.

    `mean_utterance_wer` is the mean of every utterance's own WER, only for comparison with older work.
    """

    words: Counts
    characters: Counts
    mean_utterance_wer: float
    num_utterances: int

    @property
    def wer(self) -> float:
        """All word edits / all reference words."""
        return self.words.rate

    @property
    def cer(self) -> float:
        """All character edits, blanks between words included, / all reference characters."""
        return self.characters.rate


@dataclass(frozen=True)
class Tally:
    """What was counted for each utterance: `words` and `characters` (U, 4), in the order of Counts' fields."""

    words: Longs
    characters: Longs

    @classmethod
    def of(cls, refs: Sequence[str], hyps: Sequence[str]) -> "Tally":
        """Align hypotheses with references, which are normalised alike; white space separates words.

        Raises UserError for lists that are empty or of different lengths.
        """
        if len(refs) != len(hyps):
            raise UserError(f"{len(refs)} references but {len(hyps)} hypotheses; expected one hypothesis per reference")
        if not refs:
            raise UserError("no utterance to score; expected at least one reference: check the data given")
        refs, hyps = ([" ".join(text.split()) for text in texts] for texts in (refs, hyps))
        words, characters = jiwer.process_words(refs, hyps), jiwer.process_characters(refs, hyps)
        return cls(_counted(words.alignments), _counted(characters.alignments))

    @property
    def edits(self) -> Longs:
        """Wrong, additional and missing words of each utterance, (U,)."""
        return self.words[:, 1:].sum(1)

    @property
    def ref_words(self) -> Longs:
        """Words of each reference, (U,)."""
        return self.words[:, [0, 1, 3]].sum(1)

    def where(self, mask: NDArray[np.bool_]) -> "Tally":
        """The utterances for which `mask` (U,) is true."""
        return Tally(self.words[mask], self.characters[mask])

    def scores(self) -> Scores:
        """The sums over all utterances."""
        words, characters = (Counts(*counts.sum(0).tolist()) for counts in (self.words, self.characters))
        return Scores(words, characters, float((self.edits / np.maximum(1, self.ref_words)).mean()), len(self.words))


_KINDS = ("equal", "substitute", "insert", "delete")


def _counted(alignments: Sequence[Sequence[jiwer.AlignmentChunk]]) -> Longs:
    counts = np.zeros((len(alignments), len(_KINDS)), np.int64)
    for row, chunks in zip(counts, alignments, strict=True):
        for chunk in chunks:
            size = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            row[_KINDS.index(chunk.type)] += size
    return counts


def score(refs: Sequence[str], hyps: Sequence[str]) -> Scores:
    """The scores of a corpus; raises UserError as `Tally.of` does.

    Every word said against an empty reference is an insertion.
    """
    return Tally.of(refs, hyps).scores()


def tally_rows(rows: Sequence[Row], form: str = NORMALIZERS[0]) -> Tally:
    """What was counted for each result row in a form of text.NORMALIZERS; raises UserError if there is none."""
    normalise = normalizer(form)
    return Tally.of([normalise(row.ref) for row in rows], [normalise(row.hyp) for row in rows])


def score_rows(rows: Sequence[Row], form: str = NORMALIZERS[0]) -> Scores:
    """The scores of result rows, as `tally_rows`."""
    return tally_rows(rows, form).scores()
