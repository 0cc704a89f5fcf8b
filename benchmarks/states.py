"""Task states on the quickstart's run: `python -m benchmarks.states --proj_dir output/quickstart`.

Two tasks that the run has not learned, on its own recordings: the first two words, and the kind of sentence. Each is
learned as a state on the frozen adapter, as a state and a soft prompt after the audio, as a state and an offset of all
that is read of states (which changes the run's own task, too), and with the adapter trained again, all by the same
steps, and read with silence before the speech, too. With --joined the recordings of training and test stand behind
others of the same answer, up to so many seconds: what a state still says after long audio. Then come states between two
tasks' ones; with --data and --pairs those alone, of a run with several states.
"""

import argparse
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import RESULTS, cpu_name, write_result
from rwkv_speech import SpeechLM
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Sample
from rwkv_speech.config import STATE_OFFSET
from rwkv_speech.data.dataset import SpeechDataset, normalise
from rwkv_speech.data.loader import collate
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.decoding.options import GREEDY
from rwkv_speech.models.peft import tune
from rwkv_speech.tasks import Naming
from rwkv_speech.training.optim import lr_factor, make_optimizer

ASR = "asr"
_BATCH, _LR_ADAPTER, _LR_STATE, _LR_OFFSET = 20, 1e-3, 1.0, 0.1
_FIRST_STEPS, _FIRST_BATCH = 375, 16  # of the quickstart, whose encoder has no cache
_FIRST_WORDS = {"please": "turn", "turn": "turn", "call": "meet", "ask": "meet", "visit": "meet", "meet": "meet",
                "who": "where", "where": "where", "when": "where"}  # fmt: skip
_DIGITS = "zero one two three four five six seven eight nine".split()


def kind(text: str) -> str:
    """A word for the kind of a sentence of the quickstart's grammar."""
    first = text.split()[0]
    if text.startswith("the weather"):
        return "weather"
    return "zero" if first in _DIGITS else _FIRST_WORDS.get(first, "cat")


TASKS: dict[str, Callable[[str], str]] = {"keyword": lambda text: " ".join(text.split()[:2]), "topic": kind}
STATE, SOFT_PROMPT, OFFSET, ADAPTER = VARIANTS = (
    "state", "state and soft prompt", "state and state offset", "adapter trained again"
)  # fmt: skip


def read(model: SpeechLM, manifest: Path, count: int, seconds: float = 0.0) -> list[Sample]:
    """The first utterances, as the encoder's frames; `seconds` long with silence before them if they are shorter."""
    dataset, found = SpeechDataset(open_source(str(manifest)), model.tokenizer), list[Sample]()
    for sample in (dataset[i] for i in range(min(count, len(dataset)))):
        assert isinstance(sample, Sample)
        silence = 1e-4 * torch.randn(max(0, round(seconds * SAMPLE_RATE) - len(sample.waveform)))
        found.append(encoded(model, replace(sample, waveform=torch.cat([silence, sample.waveform]))))
    return found


@torch.no_grad()
def encoded(model: SpeechLM, sample: Sample) -> Sample:
    """With its frames in place of its waveform."""
    if model.encoder.do_normalize:
        sample = replace(sample, waveform=normalise(sample.waveform), normalised=True)
    frames, [length] = model.frames(collate([sample]))
    return replace(sample, waveform=torch.empty(0), frames=frames[0, : int(length)])


def joined(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """Each behind those before it of the same text, as many as make it `seconds` long, itself again if it is alone."""
    of_text = defaultdict[str, list[Sample]](list)
    for sample in samples:
        of_text[sample.text].append(sample)
    found = list[Sample]()
    for sample in samples:
        others, parts, length = of_text[sample.text], [sample.frames], sample.duration
        number = next(i for i, other in enumerate(others) if other is sample)
        while length < seconds:
            number -= 1
            parts.insert(0, others[number % len(others)].frames)
            length += others[number % len(others)].duration
        found.append(replace(sample, frames=torch.cat([x for x in parts if x is not None])))
    return found


def of_task(model: SpeechLM, samples: Sequence[Sample], task: str) -> list[Sample]:
    """The same recordings with the texts of another task."""
    texts = [TASKS[task](sample.text) if task in TASKS else sample.text for sample in samples]
    ids = map(model.tokenizer.encode, texts)
    return [replace(s, task=task, text=t, ids=list(i)) for s, t, i in zip(samples, texts, ids, strict=True)]


def right(model: SpeechLM, samples: Sequence[Sample]) -> float:
    """The share of the utterances whose whole text is right."""
    limit = max(len(sample.ids) for sample in samples) + 8
    engine = Engine(model, GREEDY, _BATCH)
    done = engine.run(Request(number, sample, limit) for number, sample in enumerate(samples))
    texts = {found.request.key: model.tokenizer.decode(found.hypotheses[0].ids).strip() for found in done}
    return sum(texts[number] == sample.text for number, sample in enumerate(samples)) / len(samples)


def batches(samples: Sequence[Sample], epochs: int) -> Iterator[list[Sample]]:
    """Drawn anew in each epoch."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=draw).tolist()
        yield from ([samples[i] for i in order[at : at + _BATCH]] for at in range(0, len(order), _BATCH))


def train(model: SpeechLM, samples: Sequence[Sample], epochs: int) -> tuple[float, int]:
    """Train what is not frozen: the CPU's seconds, and the steps."""
    steps = epochs * math.ceil(len(samples) / _BATCH)
    rates = _LR_ADAPTER, _LR_STATE, 0.01
    tuned = {"lm": model.tuned.values(), "lr_lm": _LR_OFFSET}
    optimizer = make_optimizer(model.adapter.parameters(), model.task_parameters(), *rates, **tuned)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor("cosine", min(10, steps // 2), steps))
    start = time.process_time()
    for chosen in batches(samples, epochs):
        batch = collate(chosen)
        (model(batch) / batch.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(list(model.trained_parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.process_time() - start, steps


def with_task(run: Path, task: str, variant: str) -> SpeechLM:
    """The run's model with a new state of a task, and what the variant trains with it."""
    model = SpeechLM.from_pretrained(run)
    model.initial_states[task] = torch.nn.Parameter(torch.zeros_like(model.initial_states[ASR]))
    if variant == SOFT_PROMPT:
        model.add_soft_prompts([task], 4)
    if variant == ADAPTER:
        model.initial_states[ASR].requires_grad_(False)
    else:
        model.freeze_all_but([task])
    if variant == OFFSET:
        model.parts = replace(model.parts, train_parts=STATE_OFFSET)
        tune(model.lm, None, STATE_OFFSET)
    return model


def first_task_seconds(run: Path, data: Path, rounds: int = 6) -> float:
    """The CPU's seconds of the run's own training, from a few of its steps: encoder, language model, all gradients."""
    model = SpeechLM.from_pretrained(run)
    dataset = SpeechDataset(open_source(str(data)), model.tokenizer, normalise=model.encoder.do_normalize)
    optimizer = make_optimizer(model.adapter.parameters(), model.task_parameters(), 0.0, 0.0, 0.0)
    start = 0.0
    for number in range(rounds + 1):  # the first warms up
        start = start if number > 1 else time.process_time()
        batch = collate([dataset[_FIRST_BATCH * number + i] for i in range(_FIRST_BATCH)])
        (model(batch) / batch.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - start) / rounds * _FIRST_STEPS


def table(run: Path, given: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, SpeechLM]]:
    """Each task by each variant; and the models with a new state alone."""
    data, rows, kept = run / "data", list[dict[str, object]](), dict[str, SpeechLM]()
    first = first_task_seconds(run, data / "train.jsonl")
    base = SpeechLM.from_pretrained(run)
    start = time.process_time()
    heard = read(base, data / "train.jsonl", given.train)
    encoding = time.process_time() - start
    plain = read(base, data / "test.jsonl", given.test)
    silent = {seconds: read(base, data / "test.jsonl", given.test, seconds) for seconds in given.seconds}
    asr = right(base, of_task(base, plain, ASR))
    rows.append({"task": ASR, "variant": "the run's own", "right": asr, **by_length(base, silent, "of silence")})
    for task in TASKS:
        short, tested = of_task(base, heard, task), of_task(base, plain, task)
        learned = [*short, *(sample for seconds in given.joined for sample in joined(short, seconds))]
        quiet = {seconds: of_task(base, samples, task) for seconds, samples in silent.items()}
        long = {seconds: joined(tested, seconds) for seconds in given.joined}
        for variant in VARIANTS:
            model = with_task(run, task, variant)
            taken, steps = train(model, learned, given.epochs)
            model.eval()
            row = {"task": task, "variant": variant, "right": right(model, tested), "steps": steps}
            row |= by_length(model, quiet, "of silence") | by_length(model, long, "joined")
            row |= {"majority": majority(tested)}
            row |= {"time against the first task's": (taken + encoding) / first}
            row |= {"recognition still right": right(model, of_task(model, plain, ASR)) / max(asr, 1e-9)}
            rows.append(row)
            print(row, flush=True)
            if variant == STATE:
                kept[task] = model
    return rows, kept


def majority(samples: Sequence[Sample]) -> float:
    """The share of the most frequent text."""
    return Counter(sample.text for sample in samples).most_common(1)[0][1] / len(samples)


def by_length(model: SpeechLM, tests: dict[float, list[Sample]], how: str) -> dict[str, float]:
    """The share that is right, of recordings that are so long."""
    return {f"right, {seconds:g} s {how}": right(model, samples) for seconds, samples in tests.items()}


def curves(model: SpeechLM, pairs: Sequence[str], tests: dict[str, list[Sample]]) -> list[dict[str, object]]:
    """States between two tasks' ones, in eleven points: the share of each task's recordings whose text is right."""
    rows = list[dict[str, object]]()
    for first, second in (pair.split(":") for pair in pairs):
        ends = [model.initial_states[name].detach() for name in (first, second)]
        for weight in (point / 10 for point in range(11)):
            mixed = (1 - weight) * ends[0] + weight * ends[1]
            for name in (first, second):
                model.initial_states[name] = torch.nn.Parameter(mixed, requires_grad=False)
            shares = {f"right as {name}": right(model, tests[name]) for name in (first, second)}
            rows.append({"from": first, "to": second, "weight": weight, **shares})
            print(rows[-1], flush=True)
        for name, end in zip((first, second), ends, strict=True):
            model.initial_states[name] = torch.nn.Parameter(end, requires_grad=False)
    return rows


def of_states(model: SpeechLM, manifest: Path, count: int) -> dict[str, list[Sample]]:
    """The first utterances of each of the model's states, as frames."""
    naming = Naming.among(list(model.initial_states))
    dataset = SpeechDataset(open_source(str(manifest)), model.tokenizer, naming=naming)
    found: dict[str, list[Sample]] = {name: [] for name in model.initial_states}
    for sample in (dataset[i] for i in range(len(dataset))):
        if isinstance(sample, Sample) and len(found[sample.task]) < count and not sample.then:
            found[sample.task].append(encoded(model, sample))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proj_dir", type=Path, required=True, help="a run of demo/quickstart.sh")
    parser.add_argument("--train", type=int, default=300, help="recordings that a new task is learned from")
    parser.add_argument("--test", type=int, default=60, help="recordings of unseen speakers that it is tested on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--seconds", type=float, nargs="*", default=[2.0, 8.0, 25.0], help="lengths with silence before"
    )
    parser.add_argument("--joined", type=float, nargs="*", default=[], help="lengths with others before")
    parser.add_argument("--pairs", nargs="*", default=["asr:keyword", "keyword:topic"], help="states to go between")
    parser.add_argument("--data", type=Path, help="test lines of the run's own states, whose curves alone are wanted")
    given = parser.parse_args(argv)
    torch.manual_seed(1)
    rows, model = list[dict[str, object]](), SpeechLM.from_pretrained(given.proj_dir)
    if given.data:
        tests = of_states(model, given.data, given.test)
    else:
        rows, models = table(given.proj_dir, given)
        heard = read(model, given.proj_dir / "data" / "test.jsonl", given.test)
        tests = {task: of_task(model, heard, task) for task in (ASR, *TASKS)}
        for task, other in models.items():
            model.initial_states[task] = other.initial_states[task]
    content = {"new states": rows, "between two states": curves(model, given.pairs, tests)}
    print(
        write_result("states", RESULTS, ["python -m benchmarks.states", *(argv or sys.argv[1:])], cpu_name(), **content)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
