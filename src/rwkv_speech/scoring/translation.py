"""Speech translation: BLEU and chrF by sacrebleu, each direction by itself, and their means."""

# U utterances · D directions · K counts of chrF: hypothesis, reference, common n-grams of each length

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from rwkv_speech.decoding.results import Row
from rwkv_speech.scoring.bootstrap import Floats, Interval, Numbers
from rwkv_speech.scoring.measure import Measure

# sacrebleu's own for Japanese needs MeCab; the others of these scripts have none that needs no download.
_TOKENIZERS = {"zh": "zh", **dict.fromkeys("ja th lo my km".split(), "char")}
_CHRF = CHRF()


def direction(row: Row) -> str | None:
    """Languages of the speech and of the text, as en-fr; None where none is known."""
    return "-".join(filter(None, (row.source_lang, row.lang))) or None


def bleu(target: str | None) -> BLEU:
    """sacrebleu's BLEU for texts in that language."""
    return BLEU(tokenize=_TOKENIZERS.get((target or "").split("-")[0].lower(), "13a"))


@dataclass(frozen=True)
class Translation(Measure):
    """Rows, and what chrF counts of each, (U, K): texts are taken as they are."""

    rows: Sequence[Row]
    ngrams: NDArray[np.int64]

    unit: ClassVar[str] = ""
    head: ClassVar[tuple[str, ...]] = ("chrF", "BLEU")

    @classmethod
    def of(cls, rows: Sequence[Row], form: str) -> "Translation":
        """Of result rows, whatever the form: case and punctuation count."""
        # What sacrebleu's own bootstrap takes: its public scores of chrF hold no counts.
        return cls(rows, np.array(_CHRF._extract_corpus_statistics([r.hyp for r in rows], [[r.ref for r in rows]])))

    @property
    def name(self) -> str:
        """chrF, which is steadier than BLEU on few texts."""
        return "chrF"

    @cached_property
    def _directions(self) -> dict[str, NDArray[np.bool_]]:
        """Where each direction's rows are, in the order of their names."""
        found = np.array([direction(row) or "" for row in self.rows], dtype=object)
        return {name: found == name for name in sorted(set(found))}

    @cached_property
    def counts(self) -> Numbers:
        """(U, D K): each row's n-grams in the columns of its direction."""
        return np.concatenate([self.ngrams * mask[:, None] for mask in self._directions.values()], 1)

    def rates(self, sums: Numbers) -> Floats:
        """1 - chrF, the mean over those directions that have a text."""
        counted = sums.reshape(len(sums), -1, self.ngrams.shape[1])
        there = counted[:, :, :2].any(2)
        return 1 - (chrf(counted) * there).sum(1) / np.maximum(1, there.sum(1))

    def part(self, mask: NDArray[np.bool_]) -> "Translation":
        """Of some utterances."""
        return Translation([row for row, wanted in zip(self.rows, mask, strict=True) if wanted], self.ngrams[mask])

    @cached_property
    def bleu(self) -> dict[str, tuple[float, str]]:
        """Of each direction: BLEU of its corpus, and sacrebleu's signature."""
        found = {}
        for name, mask in self._directions.items():
            rows = [row for row, wanted in zip(self.rows, mask, strict=True) if wanted]
            metric = bleu(rows[0].lang)
            score = metric.corpus_score([row.hyp for row in rows], [[row.ref for row in rows]]).score
            found[name] = score, str(metric.get_signature())
        return found

    @property
    def mean_bleu(self) -> float:
        """The mean over directions."""
        return float(np.mean([score for score, _ in self.bleu.values()]))

    def signatures(self) -> list[str]:
        """What sacrebleu calls what it did: chrF's, and BLEU's of the languages here."""
        _CHRF.corpus_score([""], [[""]])  # the signature knows how many references there were
        bleus = dict.fromkeys(signature for _, signature in self.bleu.values())
        return [f"chrF2 {_CHRF.get_signature()}", *(f"BLEU {signature}" for signature in bleus)]

    def numbers(self) -> dict[str, Any]:
        """Scores from 0 to 100, as sacrebleu gives them, and its signatures."""
        return {"chrf": 100 * (1 - self.error), "bleu": self.mean_bleu, "signatures": self.signatures()}

    def lines(self, interval: Interval) -> list[str]:
        """Means, and what was counted how."""
        many = f"   (means over {len(self.bleu)} directions)" if len(self.bleu) > 1 else ""
        return [f"{self.main(interval)}   BLEU {self.mean_bleu:.2f}{many}", *self.signatures()]

    def report(self) -> str:
        """Both scores."""
        return f"{super().report()} BLEU {self.mean_bleu:.2f}"

    def cells(self) -> tuple[str, ...]:
        """As `head` says."""
        return self.shown(self.error), f"{self.mean_bleu:.2f}"


def chrf(counted: Numbers) -> Floats:
    """chrF, 0 to 1, of counts (..., K): the F score, recall twice as heavy, of the mean precision and recall.

    After Popović (WMT 2015), over the lengths of n-grams that both sides have, as sacrebleu.
    """
    hyp, ref, common = (counted[..., i::3] for i in range(3))
    orders = np.maximum(1, ((hyp > 0) & (ref > 0)).sum(-1))
    precision, recall = ((common / np.maximum(1, x)).sum(-1) / orders for x in (hyp, ref))
    return np.asarray(5 * precision * recall / np.maximum(1e-16, 4 * precision + recall))
