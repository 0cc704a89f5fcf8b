"""`python -m rwkv_speech.synthetic.make_corpus --out FOLDER`: the corpus of the quickstart, spoken by eSpeak NG."""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import soundfile

from rwkv_speech.audio import SAMPLE_RATE
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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=1200, help="training utterances")
    parser.add_argument("--valid", type=int, default=60, help="utterances scored during training, by training voices")
    parser.add_argument("--test", type=int, default=240, help="test utterances, by voices that are heard nowhere else")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    words = make_corpus(args.out, {"train": args.train, "valid": args.valid, "test": args.test}, args.seed)
    vocabulary = set().union(*words.values())
    print(f"{args.train} + {args.valid} + {args.test} utterances over {len(vocabulary)} words in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
