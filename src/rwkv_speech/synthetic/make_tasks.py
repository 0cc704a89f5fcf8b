"""`python -m rwkv_speech.synthetic.make_tasks --out FOLDER`: the tasks of the small world, spoken by eSpeak NG."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.errors import exit_code
from rwkv_speech.files import write_text_atomically
from rwkv_speech.flags import OutFlags, flag, parse
from rwkv_speech.synthetic import world
from rwkv_speech.synthetic.espeak import Synthesizer, Voice
from rwkv_speech.synthetic.phones import voice_of
from rwkv_speech.synthetic.voices import TEST_VARIANTS, TRAIN_VARIANTS

# Task, language spoken, language written: each has the same share of the lines.
KINDS = (
    ("asr", "en", "en"),
    ("asr", "es", "es"),
    ("st", "en", "es"),
    ("st", "es", "en"),
    ("qa", "en", "en"),
    ("qa", "en", "en"),
    ("topic", "en", "en"),
    ("chat", "en", "en"),
)


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.make_tasks"""

    train: int = flag(2400, "training lines", at_least=1)
    valid: int = flag(80, "lines scored during training, by training voices", at_least=1)
    test: int = flag(640, "test lines, by voices that nothing else uses", at_least=1)
    seed: int = flag(7, "seed of texts and voices", at_least=0, at_most=2**32 - 1)


class _Recorder:
    """Speaks texts into numbered files of a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.count, self.synthesizer = folder, name, 0, Synthesizer()
        (folder / name).mkdir(parents=True, exist_ok=True)

    def say(self, text: str, speaker: Voice) -> dict[str, Any]:
        """The manifest's keys of one recording."""
        waveform = self.synthesizer.say(text, speaker).waveform()
        file = f"{self.name}/{self.count:05d}.flac"
        self.count += 1
        soundfile.write(self.folder / file, waveform.numpy(), SAMPLE_RATE)
        return {"audio_filepath": file, "duration": round(len(waveform) / SAMPLE_RATE, 4)}

    def row(self, line: world.Line, speaker: Voice) -> dict[str, Any]:
        """The manifest's line; a conversation's recordings are in its turns."""
        row = {"task": line.task, "lang": line.text_lang, "speaker": speaker.name}
        if line.before:
            turns = [(said, answer) for said, answer in (*line.before, (line.said, line.text))]
            return row | {"turns": [self.say(said, speaker) | {"answer": answer} for said, answer in turns]}
        row |= self.say(line.said, speaker) | {"answer" if line.task == "qa" else "text": line.text}
        return row if line.task == "asr" else row | {"source_lang": line.lang, "source_text": line.said}


def make_tasks(config: Flags) -> None:
    """Write {train,valid,test}.jsonl and the audio beside them.

    The test's sentences are those of `world.split`, its voices are used neither in training nor in the pretraining of
    the tiny encoder.
    """
    out = Path(config.out)
    for part, name in enumerate(("train", "valid", "test")):
        rng = random.Random(config.seed * 10 + part)
        variants = TEST_VARIANTS if name == "test" else TRAIN_VARIANTS
        recorder, rows = _Recorder(out, name), list[str]()
        for index in range(getattr(config, name)):
            line = world.draw(rng, *KINDS[index % len(KINDS)], name)
            rows.append(json.dumps(recorder.row(line, voice_of(rng, line.lang, variants)), ensure_ascii=False) + "\n")
        write_text_atomically(out / f"{name}.jsonl", "".join(rows))
        print(f"{name}: {len(rows)} lines, {recorder.count} recordings in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: make_tasks(parse(Flags, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
