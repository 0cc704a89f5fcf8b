"""Keywords against none: `python -m benchmarks.keywords --checkpoint output/quickstart`.

eSpeak NG says sentences of the quickstart's kind, in voices that nothing was trained on. "rare": one word of each is of
those that the tiny language model knows, and that no training speech holds; 60 such words are listed. "plain": the
sentences as they are, with 100 phrases listed that nobody says: 61 further words and made-up names. Precision, recall
and F1 (%) are of the listed words, WER (%) of all; time is that with keywords by that without, turn about.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.common import RESULTS, cpu_name, interleaved, write_result
from rwkv_speech.decoding.results import Row
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.scoring.errors import align
from rwkv_speech.scoring.metrics import score_rows
from rwkv_speech.synthetic import corpus
from rwkv_speech.synthetic.espeak import Synthesizer
from rwkv_speech.synthetic.phones import voice_of
from rwkv_speech.synthetic.voices import TEST_VARIANTS

LISTED, ABSENT = 60, 100


def word_lists(seed: int) -> tuple[list[str], list[str]]:
    """Words that no sentence of the corpus holds, some to be listed and said, some to be listed alone."""
    rng = random.Random(seed)
    used = {word for _ in range(20_000) for word in corpus.sentence(rng).split()}
    unused = sorted(set(corpus.words()) - used)
    rng.shuffle(unused)
    absent = unused[LISTED:][:ABSENT]
    absent += [corpus.made_up_words(rng).split()[0] for _ in range(ABSENT - len(absent))]
    return unused[:LISTED], absent


def sentences(count: int, seed: int, rare: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Text and waveform; with a rare word each in place of another, if there are any."""
    rng, synthesizer, found = random.Random(seed), Synthesizer(), list[tuple[str, Tensor]]()
    while len(found) < count:
        words = corpus.sentence(rng).split()
        if rare and len(words) < 4:
            continue
        if rare:
            words[rng.randrange(1, len(words))] = rng.choice(rare)
        text = " ".join(words)
        found.append((text, synthesizer.say(text, voice_of(rng, "en", TEST_VARIANTS)).waveform()))
    return found


def decode(model: SpeechLM, said: Sequence[tuple[str, Tensor]], batch_size: int, **options: Any) -> list[Row]:
    """The texts of sentences, each as it is."""
    audio = [waveform for _, waveform in said]
    found = model.transcribe(audio, batch_size, vad="none", temperature=0.0, **options)
    return [Row(str(i), i, text, x.text, None, "asr", x.seconds, x.cut) for i, ((text, _), x) in
            enumerate(zip(said, found, strict=True))]  # fmt: skip


def scores(rows: Sequence[Row], listed: Sequence[str] = ()) -> dict[str, float]:
    """WER and, of the listed words, precision, recall and F1, in %."""
    pairs = [pair for utterance in align(rows) for pair in utterance.words]
    said, found = (sum(pair[place] in listed for pair in pairs) for place in (1, 2))
    hits = sum(kind == "equal" and word in listed for kind, word, _ in pairs)
    wer = {"WER": 100 * score_rows(rows).wer}
    if not listed:
        return wer
    f1 = 200 * hits / max(1, said + found)
    return wer | {"precision": 100 * hits / max(1, found), "recall": 100 * hits / max(1, said), "F1": f1}


def measure(model: SpeechLM, count: int, batch_size: int, rounds: int, beam: int, weight: float) -> dict[str, Any]:
    """Scores with and without, and the share of time."""
    listed, absent = word_lists(1)
    rare, plain = sentences(count, 2, listed), sentences(count, 3, [])
    shared: dict[str, Any] = {"batch_size": batch_size, "beam": beam}
    lists: list[dict[str, Any]] = [{"keywords": words, "keyword_weight": weight} for words in (listed, absent)]
    listing, none_there = lists
    times = interleaved(
        {
            "without": lambda: decode(model, plain, **shared),
            "with": lambda: decode(model, plain, **shared, **none_there),
        },
        rounds,
    )
    return {
        "rare, without": scores(decode(model, rare, **shared), listed),
        "rare, with": scores(decode(model, rare, **shared, **listing), listed),
        "plain, without": scores(decode(model, plain, **shared)),
        "plain, with": scores(decode(model, plain, **shared, **none_there)),
        "time": times["with"] / times["without"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run of the quickstart")
    parser.add_argument("--count", type=int, default=300, help="sentences of each kind")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--weight", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    model = SpeechLM.from_pretrained(given.checkpoint)
    found = measure(model, given.count, given.batch_size, given.rounds, given.beam, given.weight)
    for name, numbers in found.items():
        shown = {"": numbers} if isinstance(numbers, float) else numbers
        print(f"{name:<14}  " + "  ".join(f"{kind} {x:.2f}" for kind, x in shown.items()))
    command = ["python", "-m", "benchmarks.keywords", *(argv if argv is not None else sys.argv[1:])]
    print(f"written to {write_result('keywords', given.output, command, cpu_name(), **found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
