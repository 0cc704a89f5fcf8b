"""The slot engine on a run and its data: `python -m benchmarks.slots --proj_dir RUN --data MANIFEST`.

The same text for every order and number in flight; a beam search against greedy decoding, and draft and verify (where
the weights have a CTC head) against it, from decoded audio to text. The sides run in turn; medians of the ratios.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, cpu_name, write_result
from rwkv_speech import SpeechLM
from rwkv_speech.batch import Sample
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.engine import Done, Engine, Request
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.tasks import Naming

Found = dict[int, Done]


def read(model: SpeechLM, data: str, count: int) -> list[Sample]:
    """The first utterances of a data set."""
    dataset = SpeechDataset(open_source(data), model.tokenizer, naming=Naming.among(list(model.initial_states)))
    samples = [dataset[i] for i in range(min(count, len(dataset)))]
    return [sample for sample in samples if isinstance(sample, Sample)]


def decode(model: SpeechLM, samples: Sequence[Sample], options: Options, slots: int) -> tuple[float, Found]:
    """The seconds that all take together, and what is found."""
    engine = Engine(model, options, slots)
    requests = (Request(s.index, s, options.token_limit(s.duration)) for s in samples)
    start = time.perf_counter()
    found = {done.request.key: done for done in engine.run(requests)}
    return time.perf_counter() - start, found


def in_flight(model: SpeechLM, samples: Sequence[Sample], slots: int, number: int) -> Found:
    """Decode with at most `number` requests in flight in an engine of so many slots."""
    engine, waiting, found = Engine(model, GREEDY, slots), list(samples), dict[int, Done]()
    while waiting or engine.num_unfinished:
        while waiting and engine.num_unfinished < number:
            sample = waiting.pop()
            engine.submit(Request(sample.index, sample, GREEDY.token_limit(sample.duration)))
        found |= {done.request.key: done for done in engine.poll()}
    return found


def differences(model: SpeechLM, samples: Sequence[Sample], slots: int = 16) -> dict[str, int]:
    """Texts, and numbers, that are not those of each utterance alone: 1, 4 and all slots in flight, three orders."""
    alone = {s.index: in_flight(model, [s], slots, 1)[s.index].hypotheses[0] for s in samples}
    texts = numbers = 0
    for seed in range(3):
        order = random.Random(seed).sample(list(samples), len(samples))
        for number in (1, 4, slots):
            for key, done in in_flight(model, order, slots, number).items():
                texts += text_of(done) != alone[key].ids
                numbers += done.hypotheses[0] != alone[key]
    return {"utterances": len(samples), "other texts": texts, "other texts or log-probabilities": numbers}


def text_of(done: Done) -> tuple[int, ...]:
    """The tokens of the best text."""
    return done.hypotheses[0].ids


def ratios(sides: dict[str, Callable[[], tuple[float, Found]]], rounds: int) -> dict[str, Any]:
    """Seconds, passes and differing texts of each side against the first one."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, Found] = {}
    for number in range(rounds + 1):  # one round warms up
        for name, side in sides.items():
            taken, last[name] = side()
            if number:
                times[name].append(taken)
    base = next(iter(sides))
    return {
        name: {
            "seconds": statistics.median(taken),
            "of the first": statistics.median(b / a for a, b in zip(times[base], taken, strict=True)),
            "passes": sum(done.passes for done in last[name].values()),
            "other texts": sum(
                last[base][key].hypotheses[0].ids != done.hypotheses[0].ids for key, done in last[name].items()
            ),
        }
        for name, taken in times.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and keep as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proj_dir", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--invariance", type=int, default=100, help="utterances of the first claim")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    model = SpeechLM.from_pretrained(args.proj_dir)
    samples = read(model, args.data, args.count)
    result: dict[str, Any] = {"invariance, float32": differences(model, samples[: args.invariance])}
    beam = Options.given(0.0, beam=4)
    sides = {"greedy": lambda: decode(model, samples, GREEDY, 16), "beam 4": lambda: decode(model, samples, beam, 16)}
    result["16 in flight"] = ratios(sides, args.rounds)
    if model.ctc:
        draft = Options.given(0.0, draft=1)
        sides = {"greedy": lambda: decode(model, samples, GREEDY, 1), "draft": lambda: decode(model, samples, draft, 1)}
        result["1 in flight"] = ratios(sides, args.rounds)
    model.lm.bfloat16()
    result["invariance, bfloat16"] = differences(model, samples[: args.invariance])
    for name, found in result.items():
        print(name, found, sep=": ")
    command = ["python", "-m", "benchmarks.slots", *(argv or sys.argv[1:])]
    path = write_result("slots-cpu", args.output, command, cpu_name(), threads=torch.get_num_threads(), **result)
    print(path)


if __name__ == "__main__":
    main()
