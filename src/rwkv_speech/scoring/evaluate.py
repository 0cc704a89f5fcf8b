"""Score a model on a data set: corpus WER and CER, error counts, speed; texts and summary as files."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rwkv_speech.data.bad_files import BadFileLog
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.source import Source
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Row, write_rows
from rwkv_speech.decoding.transcribe import transcribe_batch
from rwkv_speech.files import write_text_atomically
from rwkv_speech.models.checkpoint import one_task
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.metrics import Scores, score_rows


@dataclass(frozen=True)
class Evaluation:
    """The scores of one data set, its texts, and how long it took."""

    name: str
    scores: Scores
    rows: list[Row]
    compute_seconds: float

    @property
    def audio_seconds(self) -> float:
        """Of all utterances together."""
        return sum(row.seconds for row in self.rows)

    @property
    def times_real_time(self) -> float:
        """Seconds of audio per second of encoding and decoding; reading files is not counted."""
        return self.audio_seconds / self.compute_seconds

    def by_lang(self) -> dict[str, Scores]:
        """The scores of each language, where utterances name more than one."""
        langs = sorted({row.lang for row in self.rows if row.lang})
        if len(langs) < 2:
            return {}
        return {lang: score_rows([row for row in self.rows if row.lang == lang]) for lang in langs}

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "data": self.name,
            **asdict(self.scores),
            "wer_by_lang": {lang: scores.wer for lang, scores in self.by_lang().items()},
            "cut_off": sum(row.cut for row in self.rows),
            "audio_seconds": round(self.audio_seconds, 3),
            "compute_seconds": round(self.compute_seconds, 3),
            "times_real_time": round(self.times_real_time, 2),
        }

    def report(self) -> str:
        """What eval.py prints."""
        s = self.scores
        lines = [
            f"{self.name}: {s.num_utterances} utterances, {s.ref_words} words, {self.audio_seconds / 3600:.3f} h",
            f"  WER {100 * s.wer:.2f} %   CER {100 * s.cer:.2f} %   "
            f"(substitutions {s.substitutions}, insertions {s.insertions}, deletions {s.deletions})",
            f"  mean of per-utterance WER {100 * s.mean_utterance_wer:.2f} %   (to compare with older reports)",
            f"  {self.times_real_time:.1f} times real time",
        ]
        if langs := self.by_lang():
            lines.insert(2, "  WER " + ", ".join(f"{lang} {100 * x.wer:.2f} %" for lang, x in langs.items()))
        return "\n".join(lines)

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Texts as `stem`.jsonl, numbers as `stem`.json."""
        texts, numbers = folder / f"{stem}.jsonl", folder / f"{stem}.json"
        write_rows(texts, self.rows)
        write_text_atomically(numbers, json.dumps(self.summary(), ensure_ascii=False, indent=2) + "\n")
        return [texts, numbers]


def result_stem(spec: str, weights: str) -> str:
    """A file name of its own for every data set and checkpoint, such as eval-best-test-1c9a04.

    Sets of one name in two folders, and checkpoints of one name, differ in the last part.
    """
    place = Path(spec).resolve() if Path(spec).exists() else spec
    checkpoint = Path(weights).resolve() if Path(weights).exists() else weights
    digest = hashlib.sha256(f"{place}\n{checkpoint}".encode(errors="surrogateescape")).hexdigest()[:6]
    label = Path(spec).stem if Path(spec).exists() else spec
    return "-".join(re.sub(r"[^\w.-]+", "-", part) for part in ("eval", Path(weights).stem, label[-80:], digest))


def evaluate(
    model: SpeechLM,
    source: Source,
    name: str,
    batch_size: int,
    bad_files: BadFileLog,
    options: Options,
    *,
    task: str = "",
    progress: Callable[[int], object] = lambda _: None,
) -> Evaluation:
    """Decode every utterance greedily, in batches of like duration, and score all of them.

    Utterances that name no task have `task`, by default the model's only one. `progress` is told how many utterances
    each batch had. Raises UserError for more broken recordings than `bad_files` allows, and if none is left.
    """
    rows: list[Row] = []
    spent = 0.0
    device = next(model.trained_parameters()).device
    task = one_task("the weights", dict(model.initial_states.items()), task)
    dataset = SpeechDataset(source, model.tokenizer, task=task)
    # Shuffling groups utterances of like duration, which keeps padding small; the scores do not depend on order.
    for (batch,) in dataset.loader(Cut(batch_size)):
        bad_files.add(batch.bad, name)
        moved = batch.to(device)
        started = time.perf_counter()
        rows += transcribe_batch(model, moved, options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent += time.perf_counter() - started
        progress(len(batch) + len(batch.bad))
    bad_files.require_used(len(rows), name)
    return Evaluation(name, score_rows(rows), rows, spent)
