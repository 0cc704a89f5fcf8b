"""Score a model on a data set: corpus WER and CER, error counts, speed; texts and summary as files."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.data.bad_files import BadFileLog
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.source import Source
from rwkv_speech.files import write_text_atomically
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.metrics import Scores, score
from rwkv_speech.text import normalise_score


@dataclass(frozen=True)
class Evaluation:
    """The scores of one data set, its texts, and how long it took."""

    name: str
    scores: Scores
    rows: list[dict[str, Any]]  # id, ref, hyp, cut
    audio_seconds: float
    compute_seconds: float

    @property
    def times_real_time(self) -> float:
        """Seconds of audio per second of encoding and decoding; reading files is not counted."""
        return self.audio_seconds / self.compute_seconds

    def summary(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "data": self.name,
            **self.scores.to_dict(),
            "cut_off": sum(row["cut"] for row in self.rows),
            "audio_seconds": round(self.audio_seconds, 3),
            "compute_seconds": round(self.compute_seconds, 3),
            "times_real_time": round(self.times_real_time, 2),
        }

    def report(self) -> str:
        """What eval.py prints."""
        s = self.scores
        return "\n".join(
            (
                f"{self.name}: {s.num_utterances} utterances, {s.ref_words} words, {self.audio_seconds / 3600:.3f} h",
                f"  WER {100 * s.wer:.2f} %   CER {100 * s.cer:.2f} %   "
                f"(substitutions {s.substitutions}, insertions {s.insertions}, deletions {s.deletions})",
                f"  mean of per-utterance WER {100 * s.mean_utterance_wer:.2f} %   (to compare with older reports)",
                f"  {self.times_real_time:.1f} times real time",
            )
        )

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Texts as `stem`.jsonl, numbers as `stem`.json."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        numbers = json.dumps(self.summary(), ensure_ascii=False, indent=2) + "\n"
        paths = [folder / f"{stem}.jsonl", folder / f"{stem}.json"]
        for path, text in zip(paths, (lines, numbers), strict=True):
            write_text_atomically(path, text)
        return paths


def evaluate(
    model: SpeechLM,
    source: Source,
    name: str,
    batch_size: int,
    bad_files: BadFileLog,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """Decode every utterance greedily, in batches of like duration, and score all of them.

    Raises UserError for more broken recordings than `bad_files` allows, and if none is left.
    """
    rows: list[dict[str, Any]] = []
    audio_seconds = compute_seconds = 0.0
    for batch_rows, seconds, spent in _decode(model, source, name, batch_size, bad_files, max_new_tokens):
        rows += batch_rows
        audio_seconds += seconds
        compute_seconds += spent
    bad_files.require_used(len(rows), name)
    scores = score([normalise_score(row["ref"]) for row in rows], [normalise_score(row["hyp"]) for row in rows])
    return Evaluation(name, scores, rows, audio_seconds, compute_seconds)


def _decode(
    model: SpeechLM, source: Source, name: str, batch_size: int, bad_files: BadFileLog, max_new_tokens: int | None
) -> Iterator[tuple[list[dict[str, Any]], float, float]]:
    """For each batch: its rows, the seconds of its audio, the seconds that it took."""
    device = model.time_state.device
    # Shuffling groups utterances of like duration, which keeps padding small; the scores do not depend on order.
    for (batch,) in SpeechDataset(source, model.tokenizer).loader(Cut(batch_size)):
        bad_files.add(batch.bad, name)
        if not len(batch):
            continue
        moved = batch.to(device)
        started = time.perf_counter()
        ids, cut = model.generate(moved.waveforms, moved.num_samples, max_new_tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - started
        yield (
            [
                {"id": id_, "ref": ref, "hyp": model.tokenizer.decode(hyp), "cut": was_cut}
                for id_, ref, hyp, was_cut in zip(batch.ids, batch.texts, ids, cut, strict=True)
            ],
            int(batch.num_samples.sum()) / SAMPLE_RATE,
            spent,
        )
