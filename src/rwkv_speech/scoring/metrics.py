"""Word and character error rates over a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

from rwkv_speech.decoding.results import Row
from rwkv_speech.errors import UserError
from rwkv_speech.text import normalise_score


@dataclass(frozen=True)
class Scores:
    """Error rates as fractions (0.05 is 5 %), and the counts behind them.

    `wer` and `cer` are of the whole corpus: all edits / all reference words (or characters).
    `mean_utterance_wer` is the mean of every utterance's own WER, only for comparison with older work.
    """

    wer: float
    cer: float
    substitutions: int
    insertions: int
    deletions: int
    hits: int
    ref_words: int
    mean_utterance_wer: float
    num_utterances: int


def score(refs: Sequence[str], hyps: Sequence[str]) -> Scores:
    """Compare hypotheses with references, which the caller has normalised alike; white space separates words.

    Every word said against an empty reference is an insertion. A rate without any reference word divides by 1
    instead: 0.0 when nothing was said, else the number of words inserted, so it is always finite.

    Raises UserError for lists that are empty or of different lengths.
    """
    if len(refs) != len(hyps):
        raise UserError(f"{len(refs)} references but {len(hyps)} hypotheses; expected one hypothesis per reference")
    if not refs:
        raise UserError("no utterance to score; expected at least one reference: check the data given")
    ref_texts, hyp_texts = [" ".join(t.split()) for t in refs], [" ".join(t.split()) for t in hyps]
    words = jiwer.process_words(ref_texts, hyp_texts)
    utterance_wers = [
        sum(_size(chunk) for chunk in chunks if chunk.type != "equal") / max(len(ref), 1)
        for ref, chunks in zip(words.references, words.alignments, strict=True)
    ]
    return Scores(
        wer=words.wer,
        cer=jiwer.process_characters(ref_texts, hyp_texts).cer,
        substitutions=words.substitutions,
        insertions=words.insertions,
        deletions=words.deletions,
        hits=words.hits,
        ref_words=words.hits + words.substitutions + words.deletions,
        mean_utterance_wer=sum(utterance_wers) / len(utterance_wers),
        num_utterances=len(ref_texts),
    )


def score_rows(rows: Sequence[Row]) -> Scores:
    """The scores of result rows, whose texts are normalised for it; raises UserError if there is none."""
    return score([normalise_score(row.ref) for row in rows], [normalise_score(row.hyp) for row in rows])


def _size(chunk: jiwer.AlignmentChunk) -> int:
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
