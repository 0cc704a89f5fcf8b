"""Noisy phone transcripts with the durations of speech: the prompts that a small language model learns to read.

A prompt is a run of phones, one per stretch of time, with repeats, slips, gaps and blends, as a poor listener would
write them down: "__tttuu_". Large language models can repeat such prompts; a small one must be taught to. No audio is
involved: only eSpeak NG's phones and their durations.
"""

# A prompt positions

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rwkv_speech.synthetic.espeak import Synthesizer
from rwkv_speech.synthetic.phones import PHONES, SILENCE, spoken, voice_of
from rwkv_speech.synthetic.speech_pool import FRAMING
from rwkv_speech.synthetic.voices import TRAIN_VARIANTS

_TAKES = 3  # voices that say a text, or a word
_BY_WORD = 0.7  # of the prompts are joined from words, which are synthesised once for all texts
_STACKS = (2, 3, 3, 4, 5)  # frames of a position
_VOWELS = "iɪeɛæaɑɔoʊuʌəɜyøœɨ"
_KINDS = [[i for i, phone in enumerate(PHONES) if (phone[0] in _VOWELS) is vowel and i] for vowel in (False, True)]
_KIND_OF = [_KINDS[phone[0] in _VOWELS] for phone in PHONES]


class Speaker:
    """Says texts in different voices; the same text in the same voice is synthesised once."""

    def __init__(self) -> None:
        self._synthesizer = Synthesizer()
        self.say = lru_cache(maxsize=200_000)(self._say)

    def _say(self, text: str, lang: str, take: int) -> tuple[tuple[int, float], ...]:
        """Each phone, as its index in PHONES, and its seconds."""
        voice = voice_of(random.Random(f"{text}/{take}"), lang, TRAIN_VARIANTS)
        return tuple(spoken(self._synthesizer.say(text, voice), lang))

    def prompt(self, text: str, lang: str, rng: random.Random, difficulty: float = 1.0) -> np.ndarray:
        """The blends (A, phones) of a text as one voice says it, or as its words are said one by one."""
        if rng.random() < _BY_WORD:
            said = list[tuple[int, float]]()
            pausing = rng.choice([0.1, 0.1, 0.9])
            for word in text.split():
                said += _trimmed(self.say(word, lang, rng.randrange(4 * _TAKES)))
                if rng.random() < pausing:
                    said.append((PHONES.index(SILENCE), rng.uniform(0.02, 0.3)))
        else:
            said = list(self.say(text, lang, rng.randrange(_TAKES)))
        return blends(frames(said, rng, difficulty), rng.choice(_STACKS))


def _trimmed(said: tuple[tuple[int, float], ...]) -> Sequence[tuple[int, float]]:
    """Without the pauses around it."""
    spoken_at = [i for i, (phone, _) in enumerate(said) if phone]
    return said[spoken_at[0] : spoken_at[-1] + 1] if spoken_at else ()


def frames(said: Sequence[tuple[int, float]], rng: random.Random, difficulty: float = 1.0) -> list[int]:
    """The phone of every frame (50 Hz), misheard now and then: at difficulty 1 up to 30 % of them."""
    silence = PHONES.index(SILENCE)
    slips = difficulty * rng.uniform(0.0, 0.45) ** 1.5
    tempo = rng.uniform(0.75, 1.4)
    labels = [silence] * rng.randint(0, 8)
    for phone, seconds in said:
        slip = rng.random()
        if slip < 0.25 * slips:
            continue
        if slip < slips and phone != silence:
            phone = _misheard(phone, rng)
        length = seconds * tempo * rng.uniform(0.7, 1.4) * FRAMING.frame_rate
        labels += [phone] * min(25, int(length + rng.random()))
        if rng.random() < 0.15 * slips:
            labels += [rng.randrange(len(PHONES))] * rng.randint(1, 4)
    labels += [silence] * rng.randint(0, 10)
    flips = 0.5 * slips
    return [_misheard(label, rng) if rng.random() < flips else label for label in labels]


def _misheard(phone: int, rng: random.Random) -> int:
    """Another phone, of the same kind more often than not."""
    return rng.choice(_KIND_OF[phone]) if rng.random() < 0.7 else rng.randrange(len(PHONES))


def blends(labels: list[int], stack: int) -> np.ndarray:
    """Frames -> prompt positions of `stack` frames each: the share of every phone in each, (A, phones) float32."""
    usable = len(labels) // stack * stack
    one_hot = np.eye(len(PHONES), dtype=np.float32)[np.array(labels[:usable], dtype=np.int64)]
    return one_hot.reshape(-1, stack, len(PHONES)).mean(1)
