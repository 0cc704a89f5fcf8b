"""`python -m rwkv_speech.synthetic.make_corpus --out FOLDER`: the corpus of the quickstart, spoken by eSpeak NG."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.config import OutFlags, flag, parse
from rwkv_speech.errors import exit_code
from rwkv_speech.files import write_text_atomically
from rwkv_speech.synthetic import corpus
from rwkv_speech.synthetic.espeak import Synthesizer
from rwkv_speech.synthetic.voices import TEST_VARIANTS, TRAIN_VARIANTS, voice


def make_corpus(out: Path, sizes: dict[str, int], seed: int) -> dict[str, set[str]]:
    """Write `out`/{train,valid,test}.jsonl and the audio beside them; returns the words of each part.

    The test voices are heard neither in training nor in the pretraining of the tiny encoder.
    """
    synthesizer = Synthesizer()
    words: dict[str, set[str]] = {}
    for part, (name, count) in enumerate(sizes.items()):
        rng = random.Random(seed * 10 + part)
        variants = TEST_VARIANTS if name == "test" else TRAIN_VARIANTS
        (out / name).mkdir(parents=True, exist_ok=True)
        lines, words[name] = [], set()
        for index in range(count):
            text, speaker = corpus.sentence(rng), voice(rng, variants)
            waveform = synthesizer.say(text, speaker).waveform()
            file = f"{name}/{index:05d}.flac"
            soundfile.write(out / file, waveform.numpy(), SAMPLE_RATE)
            lines.append({"audio_filepath": file, "duration": round(len(waveform) / SAMPLE_RATE, 4), "text": text,
                          "speaker": speaker.name})  # fmt: skip
            words[name] |= set(text.split())
        write_text_atomically(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return words


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.make_corpus"""

    train: int = flag(1200, "training utterances", at_least=1)
    valid: int = flag(60, "utterances scored during training, by training voices", at_least=1)
    test: int = flag(240, "test utterances, by voices that nothing else uses", at_least=1)
    seed: int = flag(7, "seed of texts and voices", at_least=0, at_most=2**32 - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: _write(parse(Flags, argv, __doc__ or "")))


def _write(config: Flags) -> None:
    sizes = {"train": config.train, "valid": config.valid, "test": config.test}
    words = make_corpus(Path(config.out), sizes, config.seed)
    vocabulary = set().union(*words.values())
    print(f"{config.train} + {config.valid} + {config.test} utterances over {len(vocabulary)} words in {config.out}")


if __name__ == "__main__":
    sys.exit(main())
