"""Streams: words against segments, and the last minute of an hour against the first.

`python -m benchmarks.stream --checkpoint RUN --data M.jsonl`. Each sentence of a manifest comes by itself, in parts of
20 ms, and all of them come joined in fives with pauses of 0.2 to 1.5 s: WER of both ways to commit, and LAAL, with the
time of computing and without. Then a minute of sentences comes again and again: CPU time of each minute, and memory.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, cpu_name, write_result
from benchmarks.encoder import resident
from rwkv_speech import SpeechLM
from rwkv_speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.decoding.latency import Instance, listen, mean_laal, write_instances
from rwkv_speech.scoring.metrics import score

PAUSES = (0.2, 1.5)  # seconds
PART = SAMPLE_RATE // 50
COMMITS = ("segment", "word")

Row = tuple[str, Tensor, str]  # name, waveform (S,) and text


def sentences(manifest: Path, most: int | None) -> Iterator[Row]:
    """The lines of a manifest."""
    for line in manifest.read_text().splitlines()[:most]:
        row = json.loads(line)
        audio = load_audio(manifest.parent / row["audio_filepath"], row.get("offset", 0.0), row.get("duration"))
        yield row["audio_filepath"], audio, row["text"]


def joined(rows: list[Row], size: int, rng: random.Random) -> list[Row]:
    """So many rows after each other, a pause behind each."""
    found = []
    for start in range(0, len(rows), size):
        names, audios, texts = zip(*rows[start : start + size], strict=True)
        pauses = [torch.zeros(round(rng.uniform(*PAUSES) * SAMPLE_RATE)) for _ in audios]
        found.append(
            (names[0], torch.cat([x for pair in zip(audios, pauses, strict=True) for x in pair]), " ".join(texts))
        )
    return found


def heard(model: SpeechLM, commit: str, rows: list[Row]) -> list[Instance]:
    """What streams of the rows say, and when."""
    return [
        listen(model.stream(commit), audio, PART, index, name, text) for index, (name, audio, text) in enumerate(rows)
    ]


def minutes(model: SpeechLM, commit: str, minute: Tensor, count: int) -> dict[str, Any]:
    """CPU seconds of each minute of a stream, and how much memory it has taken since the second."""
    stream, taken, memory = model.stream(commit), list[float](), list[int]()
    for _ in range(count):
        start = time.process_time()
        for part in minute.split(PART):
            stream.push(part)
        taken.append(time.process_time() - start)
        gc.collect()
        memory.append(resident("VmRSS"))
    return {
        "commit": commit,
        "first": round(taken[0], 2),
        "last": round(taken[-1], 2),
        "last_by_first": round(taken[-1] / taken[0], 3),
        "last_five_by_first_five": round(statistics.mean(taken[-5:]) / statistics.mean(taken[:5]), 3),
        "times_real_time": round(60 * count / sum(taken), 1),
        "grown_mb": round((memory[-1] - memory[min(1, count - 1)]) / 1e6, 1),
    }


def sentences_table(model: SpeechLM, rows: list[Row], seed: int, log: Path | None) -> list[dict[str, Any]]:
    """Words against segments, of sentences by themselves and joined."""
    print("audio   commit    WER, %   LAAL, ms   with computing")
    table = []
    for name, audios in (("single", rows), ("fives", joined(rows, 5, random.Random(seed)))):
        for commit in COMMITS:
            found = heard(model, commit, audios)
            if log:
                write_instances(log / f"{name}-{commit}.log", found)
            wer = score([text for *_, text in audios], [x.prediction for x in found]).wer
            latency = [round(mean_laal(found, computation_aware=aware)) for aware in (False, True)]
            table.append(
                {
                    "audio": name,
                    "commit": commit,
                    "wer": round(100 * wer, 2),
                    "laal_ms": latency[0],
                    "laal_ca_ms": latency[1],
                }
            )
            print("{:7} {:8} {:7} {:10} {:16}".format(*table[-1].values()), flush=True)
    return table


def minutes_table(model: SpeechLM, rows: list[Row], count: int) -> list[dict[str, Any]]:
    """The minutes of long streams."""
    minute = torch.cat([audio for _, audio, _ in joined(rows, 5, random.Random(0))])[: 60 * SAMPLE_RATE]
    print("commit   first, s   last, s   last / first   five / five   x real time   grown, MB")
    table = []
    for commit in COMMITS:
        table.append(minutes(model, commit, minute, count))
        print("{:8} {:8} {:9} {:14} {:13} {:13} {:11}".format(*table[-1].values()), flush=True)
    return table


def main(argv: list[str] | None = None) -> None:
    """Prints the tables and writes them, with their circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", required=True, help="a run or a checkpoint, with a CTC head")
    parser.add_argument("--data", type=Path, required=True, help="manifest of the sentences")
    parser.add_argument("--sentences", type=int, help="so many of them (default: all)")
    parser.add_argument("--minutes", type=int, default=60, help="of the long streams, 0: none (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the pauses (default: %(default)s)")
    parser.add_argument("--log", type=Path, help="folder for the logs of the words' times, as OmniSTEval reads them")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    model = SpeechLM.from_pretrained(flags.checkpoint)
    rows = list(sentences(flags.data, None))
    used = rows[: flags.sentences]
    tables = {
        "sentences": sentences_table(model, used, flags.seed, flags.log) if used else [],
        "minutes": minutes_table(model, rows, flags.minutes) if flags.minutes else [],
    }
    names = ("checkpoint", "data", "sentences", "minutes", "threads", "seed")
    given = [f"--{name}={value}" for name in names if (value := getattr(flags, name)) is not None]
    command = ["python", "-m", "benchmarks.stream", *given]
    print(write_result("stream-cpu", flags.output, command, cpu_name(), **tables))


if __name__ == "__main__":
    main()
