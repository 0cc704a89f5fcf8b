"""How often each part of the training data is heard: `a.jsonl@2,b.jsonl@0.5`."""

import os
import re
from dataclasses import dataclass
from fractions import Fraction

from rwkv_speech.errors import UserError

_MOST = 1000
_WEIGHTED = re.compile(r"(?P<spec>.*)@(?P<weight>[+-]?(\d+\.?\d*|\.\d+))", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A run of `size` neighbouring utterances; each is heard `weight` times per epoch on average."""

    size: int
    weight: Fraction = Fraction(1)


def split_weight(spec: str) -> tuple[str, Fraction]:
    """Split a final `@NUMBER` off a data source; without one the weight is 1.

    A file or folder of the whole name wins over the weight. Raises UserError for a weight that is not above 0 and
    at most 1000.
    """
    found = _WEIGHTED.fullmatch(spec)
    if found is None or os.path.exists(spec):
        return spec, Fraction(1)
    weight = Fraction(found["weight"])
    if not 0 < weight <= _MOST:
        raise UserError(
            f"data source {spec!r}: weight {found['weight']}; expected above 0 and at most {_MOST}, such as @2 (every "
            "utterance twice per epoch) or @0.5 (every other one); leave the part out to give it no weight"
        )
    return found["spec"], weight
