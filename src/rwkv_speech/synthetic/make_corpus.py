"""`python -m rwkv_speech.synthetic.make_corpus --out FOLDER`: the corpus of the quickstart, spoken by eSpeak NG."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.errors import exit_code
from rwkv_speech.files import write_text_atomically
from rwkv_speech.flags import OutFlags, flag, parse
from rwkv_speech.synthetic import corpus
from rwkv_speech.synthetic.espeak import Synthesizer
from rwkv_speech.synthetic.phones import voice_of
from rwkv_speech.synthetic.voices import TEST_VARIANTS, TRAIN_VARIANTS


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.make_corpus"""

    train: int = flag(1200, "training utterances", at_least=1)
    valid: int = flag(60, "utterances scored during training, by training voices", at_least=1)
    test: int = flag(240, "test utterances, by voices that nothing else uses", at_least=1)
    seed: int = flag(7, "seed of texts and voices", at_least=0, at_most=2**32 - 1)


def make_corpus(config: Flags) -> None:
    """Write {train,valid,test}.jsonl and the audio beside them.

    The test voices are used neither in training nor in the pretraining of the tiny encoder.
    """
    synthesizer, out, words = Synthesizer(), Path(config.out), set[str]()
    for part, name in enumerate(("train", "valid", "test")):
        rng = random.Random(config.seed * 10 + part)
        variants = TEST_VARIANTS if name == "test" else TRAIN_VARIANTS
        (out / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(getattr(config, name)):
            text, speaker = corpus.sentence(rng), voice_of(rng, "en", variants)
            waveform = synthesizer.say(text, speaker).waveform()
            file, duration = f"{name}/{index:05d}.flac", round(len(waveform) / SAMPLE_RATE, 4)
            soundfile.write(out / file, waveform.numpy(), SAMPLE_RATE)
            row = {"audio_filepath": file, "duration": duration, "text": text, "speaker": speaker.name}
            lines.append(json.dumps(row) + "\n")
            words |= set(text.split())
        write_text_atomically(out / f"{name}.jsonl", "".join(lines))
    print(f"{config.train} + {config.valid} + {config.test} utterances over {len(words)} words in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: make_corpus(parse(Flags, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
