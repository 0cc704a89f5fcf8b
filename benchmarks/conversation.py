"""What the fiftieth turn of a conversation costs and remembers: `python -m benchmarks.conversation --checkpoint RUN`.

The turns are of the small synthetic world, spoken by eSpeak NG voices that nothing is trained with: a fact is told,
other things are said, and the fact is asked for so many turns later. Costs are those of one recording that is heard
before the first and before the fiftieth turn, turn about. Two sessions in one batch are compared with the same two
alone: tokens, and the bits of their states.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, cpu_name, interleaved, write_result
from benchmarks.encoder import resident
from rwkv_speech import SpeechLM
from rwkv_speech.batch import Sample
from rwkv_speech.decoding.engine import Engine
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.session import Session, Turn, converse
from rwkv_speech.synthetic import world
from rwkv_speech.synthetic.espeak import Synthesizer, Voice
from rwkv_speech.synthetic.phones import voice_of
from rwkv_speech.synthetic.voices import TEST_VARIANTS
from rwkv_speech.text import normalizer

DISTANCES, TURNS = (1, 10, 50), 50
GREEDY = Options.given(0.0)


class Talks:
    """Conversations of the world, spoken; each has a voice of its own."""

    def __init__(self, lang: str, seed: int) -> None:
        self._lang, self._rng = lang, random.Random(seed)
        synthesizer = Synthesizer()
        self._say = cache(lambda text, speaker: synthesizer.say(text, speaker).waveform())

    def draw(self, distance: int) -> tuple[list[Tensor], str]:
        """The turns as waveforms (S,), of which the last asks for what was told `distance` turns before; the answer."""
        speaker: Voice = voice_of(self._rng, self._lang, TEST_VARIANTS)
        while world.split((line := world.conversation(self._rng, self._lang, distance - 1)).key) != "test":
            pass
        return [self._say(text, speaker) for text in (*(said for said, _ in line.before), line.said)], line.text


def samples(turns: Sequence[Tensor], task: str, index: int) -> list[Sample]:
    """The turns of a conversation as a data set gives them."""
    return [
        Sample(f"{index}#{number}", x, "", [], len(x) / 16_000, index, task, turn=number)
        for number, x in enumerate(turns, start=1)
    ]


def recall(model: SpeechLM, task: str, talks: Talks, distance: int, count: int, slots: int) -> float:
    """The share of so many conversations in which the last answer is the right one."""
    drawn = [talks.draw(distance) for _ in range(count)]
    found = {
        (sample.index, sample.turn): turn.text
        for sample, turn in converse(
            model, (samples(turns, task, i) for i, (turns, _) in enumerate(drawn)), GREEDY, slots
        )
    }
    same = normalizer("casefold")
    right = [same(found[i, len(turns)]) == same(answer) for i, (turns, answer) in enumerate(drawn)]
    return sum(right) / count


def costs(model: SpeechLM, task: str, talks: Talks, rounds: int) -> dict[str, Any]:
    """Of the first turn and of turn TURNS: milliseconds until the first token, bytes of the file, resident MB."""
    turns, _ = talks.draw(TURNS)
    session, kept, memory, sizes = Session(model, task), list[Session](), list[float](), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        for number, wave in enumerate(turns, start=1):
            if number in (1, TURNS):
                kept.append(session.fork())
            session.say(wave, temperature=0.0)
            if number in (2, TURNS):
                session.save(Path(folder, "a.session"))
                sizes.append(Path(folder, "a.session").stat().st_size)
                memory.append(resident("VmRSS") / 1e6)

    def heard(before: Session) -> Turn:
        return before.fork().say(turns[0], temperature=0.0, max_new_tokens=1)  # so that both write as much

    calls: dict[str, Callable[[], Any]] = {"first": partial(heard, kept[0]), "last": partial(heard, kept[1])}
    taken = interleaved(calls, rounds)
    return {
        "first_ms": round(1e3 * taken["first"], 2),
        "last_ms": round(1e3 * taken["last"], 2),
        "time_ratio": round(taken["last"] / taken["first"], 3),
        "file_bytes": sizes,
        "resident_mb": [round(x, 1) for x in memory],
    }


def together(model: SpeechLM, task: str, talks: Talks, turns: int) -> dict[str, int]:
    """How many tokens and numbers of the states differ between two sessions in one batch and the same two alone."""
    said = [talks.draw(turns)[0] for _ in range(2)]
    alone, both = ([Session(model, task) for _ in said] for _ in range(2))
    engine, different = Engine(model, GREEDY, 2), 0
    for number in range(turns):
        expected = [one.say(waves[number], temperature=0.0) for one, waves in zip(alone, said, strict=True)]
        asked = [one.request(waves[number], GREEDY, i) for i, (one, waves) in enumerate(zip(both, said, strict=True))]
        for done in engine.run(asked):
            different += both[done.request.key].take(done).tokens != expected[done.request.key].tokens
    states = zip((x for one in alone for x in one.state), (x for one in both for x in one.state), strict=True)
    return {
        "answers": 2 * turns,
        "other_answers": different,
        "other_numbers": sum(int((x != y).sum()) for x, y in states),
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the numbers and writes them, with their circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", required=True, help="a run or a checkpoint")
    parser.add_argument("--task", default="chat", help="state of the conversations (default: %(default)s)")
    parser.add_argument("--lang", default="en", help="en or es (default: %(default)s)")
    parser.add_argument("--count", type=int, default=40, help="conversations of each distance (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="conversations held at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="of timing (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of texts and voices (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    flags = parser.parse_args(argv)
    model, talks = SpeechLM.from_pretrained(flags.checkpoint), Talks(flags.lang, flags.seed)
    found: dict[str, Any] = {"costs": costs(model, flags.task, talks, flags.rounds)}
    print(found["costs"], flush=True)
    found["together"] = together(model, flags.task, talks, 5)
    print(found["together"], flush=True)
    found["recall"] = {}
    for distance in DISTANCES if flags.count else ():
        right = recall(model, flags.task, talks, distance, flags.count, flags.slots)
        found["recall"][distance] = right
        print(f"told {distance} turns before: {100 * right:.0f} % of {flags.count} right", flush=True)
    given = [f"--{name}={getattr(flags, name)}" for name in ("checkpoint", "task", "lang", "count", "slots", "seed")]
    command = ["python", "-m", "benchmarks.conversation", *given]
    print(write_result("conversation-cpu", flags.output, command, cpu_name(), **found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
