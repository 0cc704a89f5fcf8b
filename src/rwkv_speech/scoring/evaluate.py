"""Score a model on data sets: decode them, merge what several processes found, and name the result files."""

import hashlib
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

from rwkv_speech.config import EvalConfig
from rwkv_speech.data.bad_files import BadFileLog
from rwkv_speech.scoring.processes import Progress, data_sets, decode_all
from rwkv_speech.scoring.result import Evaluation
from rwkv_speech.scoring.share import Part
from rwkv_speech.scoring.speed import Speed


def evaluate(config: EvalConfig, progress: Callable[[Progress], object] = lambda _: None) -> Iterator[Evaluation]:
    """The result of each data set in --eval_data, in their order.

    Raises UserError for more broken recordings than --max_bad, and for a set of which none is left.
    """
    names = iter(data_sets(config))
    for message in decode_all(config):
        if isinstance(message, Progress):
            progress(message)
        else:
            yield _merged(config, next(names), message)


def _merged(config: EvalConfig, name: str, parts: list[Part]) -> Evaluation:
    """The parts in the set's order, so that it makes no difference how many processes there were."""
    rows = sorted((row for part in parts for row in part.rows), key=attrgetter("place"))
    bad_files = BadFileLog(Path(config.proj_dir) / "bad_files.jsonl", config.max_bad)
    bad_files.add(sorted((sample for part in parts for sample in part.bad), key=attrgetter("index")), name)
    bad_files.require_used(len(rows), name)
    return Evaluation(
        name,
        rows,
        Speed(sum(row.seconds for row in rows), [part.seconds for part in parts]),
        tuple(filter(None, [bad_files.summary()])),
        config.normalizer,
        config.seed,
    )


def result_stem(spec: str, weights: str) -> str:
    """A file name of its own for every data set and checkpoint, such as eval-best-test-1c9a04.

    Sets of one name in two folders, and checkpoints of one name, differ in the last part.
    """
    place = Path(spec).resolve() if Path(spec).exists() else spec
    checkpoint = Path(weights).resolve() if Path(weights).exists() else weights
    digest = hashlib.sha256(f"{place}\n{checkpoint}".encode(errors="surrogateescape")).hexdigest()[:6]
    label = Path(spec).stem if Path(spec).exists() else spec
    return "-".join(re.sub(r"[^\w.-]+", "-", part) for part in ("eval", Path(weights).stem, label[-80:], digest))
