"""Word times against a ruler: `python -m benchmarks.word_times --checkpoint output/quickstart`.

eSpeak NG says sentences of the quickstart's kind with pauses of 0 to 800 ms between words, in voices that nothing was
trained on; the truth is its own word events. Errors are of the starts of the words that were recognised, in
milliseconds: of the word times, and of the same words spread over the audio by their letters. "share" is the time that
finding the words takes of that of making text of audio, "head" that of the CTC head, which other parts need, too.
"""

import argparse
import difflib
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, cpu_name, write_result
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.decoding.timestamps import WordTimes
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.synthetic import corpus
from rwkv_speech.synthetic.espeak import Synthesizer
from rwkv_speech.synthetic.phones import voice_of
from rwkv_speech.synthetic.voices import TEST_VARIANTS

LONGEST_PAUSE = 800
BATCH = 8


def sentences(count: int, seed: int) -> list[tuple[list[str], Tensor, list[float]]]:
    """Words, waveform and the second at which each word starts."""
    rng, synthesizer, found = random.Random(seed), Synthesizer(), list[tuple[list[str], Tensor, list[float]]]()
    while len(found) < count:
        words, speaker = corpus.sentence(rng).split(), voice_of(rng, "en", TEST_VARIANTS)
        pauses = [rng.randint(0, LONGEST_PAUSE) for _ in words[1:]]
        speech = synthesizer.say(" ".join(words), speaker, pauses)
        if len(speech.words) == len(words):
            found.append((words, speech.waveform(), [start / speech.sample_rate for start in speech.words]))
    return found


def ruler(words: Sequence[str], seconds: float) -> list[float]:
    """The starts of words that lie evenly in so many seconds, by their letters."""
    letters = np.cumsum([0, *map(len, words)])
    return [float(x) for x in seconds * letters[:-1] / letters[-1]]


def starts_of(found: Sequence[str], words: Sequence[str], truth: Sequence[float]) -> list[tuple[int, float]]:
    """Of each word that was recognised: its number in what was found, and its true start."""
    blocks = difflib.SequenceMatcher(None, words, found, autojunk=False).get_matching_blocks()
    return [(block.b + i, truth[block.a + i]) for block in blocks for i in range(block.size)]


def measure(model: SpeechLM, count: int, seed: int) -> dict[str, Any]:
    """Errors of both, and what the times cost."""
    assert model.ctc is not None
    said = sentences(count, seed)
    options: dict[str, Any] = {"batch_size": BATCH, "vad": "none", "temperature": 0.0, "max_segment": 60.0}
    model.transcribe([waveform for _, waveform, _ in said[:BATCH]], word_timestamps=1, **options)
    started = time.perf_counter()
    transcripts = model.transcribe([waveform for _, waveform, _ in said], word_timestamps=1, **options)
    whole = time.perf_counter() - started
    errors: dict[str, list[float]] = {"word times": [], "ruler": []}
    for (words, waveform, truth), transcript in zip(said, transcripts, strict=True):
        found = [word for segment in transcript.segments for word in segment.words or []]
        names = [word.word.strip() for word in found]
        even = ruler(names, len(waveform) / SAMPLE_RATE) if names else []
        for number, start in starts_of(names, words, truth):
            errors["word times"].append(abs(found[number].start - start))
            errors["ruler"].append(abs(even[number] - start))
    head, words_only = _costs(model, [waveform for _, waveform, _ in said], [t.text for t in transcripts])
    return {
        "words": sum(len(words) for words, _, _ in said),
        "recognised": len(errors["ruler"]),
        **{name: _percentiles(values) for name, values in errors.items()},
        "share": words_only / whole,
        "head": head / whole,
        "ms an utterance": 1000 * words_only / count,
    }


@torch.no_grad()
def _costs(model: SpeechLM, waveforms: Sequence[Tensor], texts: Sequence[str]) -> tuple[float, float]:
    """Seconds of the CTC head, and of finding the words."""
    assert model.ctc is not None
    times, head, words = WordTimes(model.ctc, model.encoder), 0.0, 0.0
    for waveform, text in zip(waveforms, texts, strict=True):
        frames, lengths = model.encoder(waveform[None], torch.tensor([len(waveform)]))
        started = time.perf_counter()
        log_probs = model.ctc(frames, lengths)[0]
        there = time.perf_counter()
        times.words(text, log_probs, 0.0, len(waveform) / SAMPLE_RATE)
        head, words = head + there - started, words + time.perf_counter() - there
    return head, words


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": 1000 * float(np.median(seconds)), "p90": 1000 * float(np.percentile(seconds, 90))}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run of the quickstart with a CTC head")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    result = measure(SpeechLM.from_pretrained(given.checkpoint), given.count, given.seed)
    for name in ("word times", "ruler"):
        print(f"{name:<10}  median {result[name]['median']:6.1f} ms, p90 {result[name]['p90']:6.1f} ms")
    print(f"{result['recognised']} of {result['words']} words recognised; the ruler's median is "
          f"{result['ruler']['median'] / result['word times']['median']:.1f} times as large")  # fmt: skip
    share, head, each = 100 * result["share"], 100 * result["head"], result["ms an utterance"]
    print(f"finding the words: {share:.2f} % of the time, {each:.2f} ms an utterance; the head {head:.2f} %")
    command = ["python", "-m", "benchmarks.word_times", *(sys.argv[1:] if argv is None else argv)]
    print(write_result("word_times", given.out, command, cpu_name(), **result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
