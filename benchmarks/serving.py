"""The server against offline batch transcription: `python -m benchmarks.serving --proj_dir RUN --data MANIFEST`.

The server runs in a process of its own; so many of the official clients ask it at once, each waiting for its answer.
Their texts must be those of `SpeechLM.transcribe` on the same clips, one at a time. The sides run in turn; medians.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import torch

from benchmarks.common import RESULTS, cpu_name, write_result
from rwkv_speech import SpeechLM
from rwkv_speech.data.sources import open_source


@contextmanager
def serving(run: str, slots: int, more: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server on a run's weights, with `more` flags."""
    words = ["serve", "--proj_dir", run, "--port", "0", "--micro_bsz", str(slots), *more]
    command = [sys.executable, "-m", "rwkv_speech", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            yield next(line for line in process.stderr if "running on" in line).split(" on ")[1].split()[0]
        finally:
            process.terminate()


def ask(client: openai.OpenAI, path: Path) -> tuple[str, float]:
    """The text of a file, and the seconds until it was there."""
    start = time.perf_counter()
    found = client.audio.transcriptions.create(file=path, model="asr")
    return found.text, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and keep as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proj_dir", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    source = open_source(args.data)
    paths = [Path(str(source.utterance(i).audio)) for i in range(min(args.count, len(source)))]
    model = SpeechLM.from_pretrained(args.proj_dir)
    alone = [model.transcribe(path)[0] for path in paths]
    audio = sum(found.seconds for found in alone)
    offline, served, waits = list[float](), list[float](), list[float]()
    wrong = 0
    with serving(args.proj_dir, args.slots) as address, ThreadPoolExecutor(args.clients) as pool:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for number in range(args.rounds + 1):  # one round warms up
            start = time.perf_counter()
            model.transcribe(paths, batch_size=args.slots)
            middle = time.perf_counter()
            found = list(pool.map(lambda path: ask(client, path), paths))
            end = time.perf_counter()
            wrong += sum(text != one.text for (text, _), one in zip(found, alone, strict=True))
            if number:
                offline.append(middle - start)
                served.append(end - middle)
                waits += [seconds for _, seconds in found]
    result = {
        "clips": len(paths),
        "seconds of audio": audio,
        "clients": args.clients,
        "texts that are not those of one alone": wrong,
        "offline, times real time": audio / statistics.median(offline),
        "served, times real time": audio / statistics.median(served),
        "served of offline": statistics.median(a / b for a, b in zip(offline, served, strict=True)),
        "seconds to an answer, median": statistics.median(waits),
        "seconds to an answer, p95": statistics.quantiles(waits, n=20)[-1],
    }
    for name, value in result.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    command = ["python", "-m", "benchmarks.serving", *(argv or sys.argv[1:])]
    print(write_result("serving-cpu", args.output, command, cpu_name(), threads=torch.get_num_threads(), **result))


if __name__ == "__main__":
    main()
