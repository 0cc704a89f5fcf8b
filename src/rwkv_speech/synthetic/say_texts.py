"""`python -m rwkv_speech.synthetic.say_texts --texts FOLDERS --out FOLDER`: lines of text, spoken by eSpeak NG.

What recordings lack, a text often has: an adapter learns from these sentences to write words that no recording says.
With `--voices` other synthesizers, whose voices are more like people's, take their turns.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.errors import UserError, exit_code
from rwkv_speech.files import write_text_atomically
from rwkv_speech.flags import OutFlags, flag, parse
from rwkv_speech.synthetic.espeak import Synthesizer, Voice
from rwkv_speech.synthetic.phones import LANGUAGES, voice_of
from rwkv_speech.synthetic.programs import Program, read_programs
from rwkv_speech.synthetic.texts import read_texts
from rwkv_speech.synthetic.voices import TRAIN_VARIANTS

# What a line may hold beside letters and blanks: other signs are read aloud in a way that the text does not show.
_SIGNS = frozenset(".,;:!?'’-")
# Half of the lines have noise of one of these amplitudes beneath them.
_NOISES = (0.001, 0.003, 0.01)


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.say_texts"""

    texts: str = flag("", "folders of .txt files, as of pretrain_lm: lines below en/, es/, fr/, it/, ru/ are spoken")
    count: int = flag(1200, "lines of each language", at_least=1)
    least_words: int = flag(2, "words of the shortest line", at_least=1)
    most_words: int = flag(25, "words of the longest line", at_least=1)
    voices: str = flag(
        "", "file of other voices, one a line: language and command, as: en flite -voice slt -o {wav} -t {text}"
    )
    seed: int = flag(7, "seed of lines and voices", at_least=0, at_most=2**32 - 1)


def say_texts(config: Flags) -> None:
    """Write train.jsonl, with the language of each line, and the audio beside it.

    Lines that pretraining holds out are left out here, too. Raises UserError for texts without a line to speak, and for
    a voice that cannot speak its first one.
    """
    programs = read_programs(config.voices) if config.voices else []
    lines = _lines(config)
    if not any(lines.values()):
        raise UserError(
            f"--texts: {config.texts} holds no line of {config.least_words} to {config.most_words} words without "
            f"digits and signs below {', '.join(LANGUAGES)}; expected one at least"
        )
    synthesizer, out, rows = Synthesizer(), Path(config.out), list[str]()
    spoken, heard, unspoken = Counter[str](), set[str](), Counter[str]()
    for lang, found in lines.items():
        rng = random.Random(f"{config.seed}/{lang}")
        (out / lang).mkdir(parents=True, exist_ok=True)
        for index, text in enumerate(rng.sample(found, min(config.count, len(found)))):
            voices: list[Voice | Program] = [voice_of(rng, lang, TRAIN_VARIANTS)]
            voice = rng.choice(voices + [x for x in programs if x.lang == lang])
            try:
                said = voice.say(text, rng) if isinstance(voice, Program) else synthesizer.say(text, voice).waveform()
            except UserError:
                if voice.name not in heard:
                    raise
                unspoken[voice.name] += 1
                continue
            heard.add(voice.name)
            waveform = _recorded(said.numpy(), rng)
            file = f"{lang}/{index:05d}.flac"
            soundfile.write(out / file, waveform, SAMPLE_RATE)
            row = {"audio_filepath": file, "duration": round(len(waveform) / SAMPLE_RATE, 4), "text": text}
            rows.append(json.dumps({**row, "task": "asr", "lang": lang, "speaker": voice.name}, ensure_ascii=False))
            spoken[lang] += 1
    write_text_atomically(out / "train.jsonl", "".join(f"{row}\n" for row in rows))
    print(f"{spoken.total()} lines in {out}: " + ", ".join(f"{lang} {count}" for lang, count in spoken.items()))
    for name, count in unspoken.items():
        print(f"{name} could not speak {count} lines: they are left out")


def _lines(config: Flags) -> dict[str, list[str]]:
    """The lines of each language that can be spoken as they are written, each once."""
    found: dict[str, dict[str, None]] = {lang: {} for lang in LANGUAGES}
    for text in read_texts(config.texts):
        for row in text.kept().rows:
            for lang, line in zip(text.langs, row, strict=True):
                fits = config.least_words <= len(line.split()) <= config.most_words
                # What two languages have in common is not translated.
                if lang in found and fits and _is_plain(line) and row.count(line) == 1:
                    found[lang][line] = None
    return {lang: list(lines) for lang, lines in found.items() if lines}


def _is_plain(line: str) -> bool:
    return any(map(str.isalpha, line)) and all(x.isalpha() or x.isspace() or x in _SIGNS for x in line)


def _recorded(waveform: np.ndarray, rng: random.Random) -> np.ndarray:
    """At a level as of a recording, half of them with some noise."""
    peak = float(np.abs(waveform).max(initial=1e-3))
    waveform = waveform * (rng.uniform(0.2, 0.8) / peak)
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0.0, rng.choice(_NOISES), len(waveform))
        waveform = waveform + noise.astype(np.float32)
    return waveform


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: say_texts(parse(Flags, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
