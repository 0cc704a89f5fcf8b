"""An hour of audio against a minute and short clips: `python -m benchmarks.long_audio --checkpoint RUN --data M.jsonl`.

Sentences of a manifest, joined in random order with pauses of 0.2 to 1.5 s, are transcribed as one file of an hour, one
of a minute, and each by itself, as if somebody had cut the hour at the true ends of its sentences; each in a process of
its own, on a CPU. Peaks are of the whole process; times are without loading.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import soundfile
import torch

from benchmarks.common import RESULTS, cpu_name, write_result
from benchmarks.encoder import resident
from rwkv_speech import SpeechLM
from rwkv_speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.scoring.metrics import Scores, score

PAUSES = (0.2, 1.5)  # seconds


def join(manifest: Path, seconds: float, folder: Path, seed: int) -> None:
    """Write sentences as one file, long.flac, and as one each; texts.json holds their texts."""
    rng, at, texts = random.Random(seed), 0, list[str]()
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    folder.mkdir()
    with soundfile.SoundFile(folder / "long.flac", "w", SAMPLE_RATE, 1) as file:
        while at < seconds * SAMPLE_RATE:
            row = rng.choice(rows)
            audio = load_audio(manifest.parent / row["audio_filepath"], row.get("offset", 0.0), row.get("duration"))
            soundfile.write(folder / f"{len(texts):05}.flac", audio.numpy(), SAMPLE_RATE)
            texts.append(row["text"])
            pause = torch.zeros(round(rng.uniform(*PAUSES) * SAMPLE_RATE))
            file.write(torch.cat([audio, pause]).numpy())
            at += len(audio) + len(pause)
    (folder / "texts.json").write_text(json.dumps(texts))


def transcribe(checkpoint: str, files: list[Path], slots: int) -> dict[str, Any]:
    """In this process: what is said in the files, how long they last, how long it took, the peak of memory."""
    model = SpeechLM.from_pretrained(checkpoint)
    model.transcribe(torch.zeros(SAMPLE_RATE), vad="none")  # what is built at the first call
    start = time.perf_counter()
    found = model.transcribe(files, batch_size=slots)
    return {
        "taken": time.perf_counter() - start,
        "seconds": sum(transcript.seconds for transcript in found),
        "removed_seconds": sum(transcript.removed_seconds for transcript in found),
        "segments": sum(len(transcript.segments) for transcript in found),
        "text": " ".join(transcript.text for transcript in found),
        "peak_mb": resident("VmHWM") / 1e6,
    }


def in_process(checkpoint: str, files: str, slots: int, threads: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_audio", "--checkpoint", checkpoint, "--child", files]
    command += ["--slots", str(slots), "--threads", str(threads)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return found


def row_of(name: str, found: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """A row of the table."""
    return {
        "audio": name,
        "seconds": round(found["seconds"], 1),
        "removed_seconds": round(found["removed_seconds"], 1),
        "segments": found["segments"],
        "times_real_time": round(found["seconds"] / found["taken"], 1),
        "peak_mb": round(found["peak_mb"], 1),
        "wer": round(100 * scores.wer, 2),
        "errors": [scores.words.substitutions, scores.words.insertions, scores.words.deletions],
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it, with its circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", required=True, help="a run or a checkpoint")
    parser.add_argument("--data", type=Path, help="manifest of the sentences")
    parser.add_argument("--seconds", type=float, default=3600, help="of the long file (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="texts made at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the pauses (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    parser.add_argument("--child", help="transcribe these files, print what was found, no more")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    if flags.child:
        folder, pattern = Path(flags.child).parent, Path(flags.child).name
        print(json.dumps(transcribe(flags.checkpoint, sorted(folder.glob(pattern)), flags.slots)))
        return
    rows = []
    print("audio        seconds  removed  segments  x real time  peak, MB   WER, %   S, I, D")
    with tempfile.TemporaryDirectory() as temporary:
        for name, seconds in (("minute", 60.0), ("long", flags.seconds)):
            join(flags.data, seconds, Path(temporary) / name, flags.seed)
        for name, files in (("minute", "minute/long.flac"), ("long", "long/long.flac"), ("clips", "long/[0-9]*.flac")):
            found = in_process(flags.checkpoint, str(Path(temporary) / files), flags.slots, flags.threads)
            texts = json.loads((Path(temporary) / files).with_name("texts.json").read_text())
            rows.append(row_of(name, found, score([" ".join(texts)], [found["text"]])))
            print("{:10} {:9} {:8} {:9} {:12} {:9} {:8}   {}".format(*rows[-1].values()), flush=True)
    minute, long, clips = rows
    ratios = {
        "peak": round(long["peak_mb"] / minute["peak_mb"], 3),
        "times_real_time": round(long["times_real_time"] / clips["times_real_time"], 3),
        "wer_of_seams": round(long["wer"] - clips["wer"], 2),
    }
    print(ratios)
    given = [
        f"--{name}={getattr(flags, name)}" for name in ("checkpoint", "data", "seconds", "slots", "threads", "seed")
    ]
    command = ["python", "-m", "benchmarks.long_audio", *given]
    print(write_result("long_audio-cpu", flags.output, command, cpu_name(), ratios=ratios, rows=rows))


if __name__ == "__main__":
    main()
