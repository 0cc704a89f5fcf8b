"""How soon words are there that somebody is speaking: `python -m benchmarks.realtime --proj_dir RUN --data MANIFEST`.

The server runs in a process of its own; the official client sends each clip as it is spoken, 40 ms at a time, a second
of silence behind it. Of each clip: from the end of the first words in the audio, by the CTC head, to the delta that
brings them, where `SpeechLM.transcribe` finds the same; and from the end of the clip to its whole transcript.
"""

import argparse
import base64
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch

from benchmarks.common import RESULTS, cpu_name, write_result
from benchmarks.serving import serving
from benchmarks.stream import Row, sentences
from rwkv_speech import SpeechLM
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.models.parts import Parts
from rwkv_speech.scoring.metrics import score

PART = SAMPLE_RATE // 25


def spoken(connection: Any, row: Row) -> tuple[list[tuple[str, float]], str, float]:
    """The deltas of a clip, when each was there, the transcript, and when that was: seconds since the clip began."""
    samples = torch.cat([row[1], torch.zeros(SAMPLE_RATE)])
    data = (32_767 * samples).round().clamp(-32_768, 32_767).short().numpy()
    begun = time.perf_counter()

    def send() -> None:
        for end in range(PART, len(data) + PART, PART):
            time.sleep(max(0.0, begun + min(end, len(data)) / SAMPLE_RATE - time.perf_counter()))
            connection.input_audio_buffer.append(audio=base64.b64encode(data[end - PART : end].tobytes()).decode())
        connection.input_audio_buffer.clear()  # all turns have ended in the silence; its answer is the last event

    sender = threading.Thread(target=send)
    sender.start()
    deltas, texts, done = list[tuple[str, float]](), list[str](), 0.0
    while (event := connection.recv()).type != "input_audio_buffer.cleared":
        now = time.perf_counter() - begun
        if event.type.endswith(".delta"):
            deltas.append((event.delta, now))
        elif event.type.endswith(".completed"):
            texts.append(event.transcript)
            done = now
    sender.join()
    return deltas, " ".join(texts), done


def waits(model: SpeechLM, row: Row, deltas: list[tuple[str, float]], done: float) -> tuple[float | None, float]:
    """Seconds from the end of the words of the first delta to it, and from the end of the clip to the transcript."""
    [known] = model.transcribe([row[1]], word_timestamps=1)
    words = [(x.word.strip(), x.end) for x in known.words or []]
    rest = done - len(row[1]) / SAMPLE_RATE
    if not deltas:
        return None, rest
    first, now = deltas[0]
    said = first.split()
    is_known = said == [word for word, _ in words[: len(said)]]
    return (now - words[len(said) - 1][1] if is_known else None), rest


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and keep as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proj_dir", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--delay", default="low")
    for name in ("load_model", "encoder", "vocab_file"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    parts = {name: getattr(args, name) for name in ("load_model", "encoder", "vocab_file")}
    rows = list(sentences(args.data, args.count))
    words = [word for name, value in parts.items() if value for word in (f"--{name}", value)]
    setting = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}, "transcription": {"delay": args.delay}}

    with serving(args.proj_dir, 8, words) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def speak(mine: list[Row]) -> list[tuple[list[tuple[str, float]], str, float]]:
            with client.realtime.connect(model="asr", extra_query={"intent": "transcription"}) as connection:
                audio: Any = {"input": setting}
                connection.session.update(session={"type": "transcription", "audio": audio})
                while connection.recv().type != "session.updated":
                    pass
                return [spoken(connection, row) for row in mine]

        speak(rows[:2])  # warms up
        shares = [rows[number :: args.clients] for number in range(args.clients)]
        with ThreadPoolExecutor(args.clients) as pool:
            found = [x for share in pool.map(speak, shares) for x in share]
    rows = [row for share in shares for row in share]
    model = SpeechLM.from_pretrained(args.proj_dir, Parts.from_dict(parts))
    measured = [waits(model, row, deltas, done) for row, (deltas, _, done) in zip(rows, found, strict=True)]
    first = [seconds for seconds, _ in measured if seconds is not None]
    result = {
        "clips": len(rows),
        "clients": args.clients,
        "delay": args.delay,
        "first words compared": len(first),
        "first words, seconds after their end, median": statistics.median(first),
        "first words, p95": statistics.quantiles(first, n=20)[-1],
        "transcript, seconds after the end of the clip, median": statistics.median(rest for _, rest in measured),
        "WER": score([row[2] for row in rows], [text for _, text, _ in found]).wer,
    }
    for name, value in result.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    command = ["python", "-m", "benchmarks.realtime", *(argv or sys.argv[1:])]
    name = f"realtime-cpu-{args.delay}-{args.clients}"
    print(write_result(name, args.output, command, cpu_name(), threads=torch.get_num_threads(), **result))


if __name__ == "__main__":
    main()
