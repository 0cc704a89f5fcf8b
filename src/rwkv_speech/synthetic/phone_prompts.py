"""Noisy phone transcripts with the durations of speech: the prompts that the tiny language model learns to read.

A prompt is a run of phone letters, one per stretch of time, with repeats, slips, gaps and blends, as a poor
listener would write them down: "__DDAHH_wwEE..." Large language models can repeat such prompts; the tiny one must
be taught to. No audio is involved: only eSpeak NG's phones and durations of single words.
"""

import random
from itertools import pairwise

import numpy as np

from rwkv_speech.synthetic import corpus
from rwkv_speech.synthetic.espeak import Synthesizer
from rwkv_speech.synthetic.speech_pool import FRAMING
from rwkv_speech.synthetic.voices import PHONES, SILENCE, TRAIN_VARIANTS, phone, voice

# One printable byte a phone, none of them a lower-case letter, a blank or the separator "#".
PHONE_LETTERS = "_PBTDKGFV0Z" + "SHCJMNL" + "RWY" + "IEAOU" + "QX123456789!$%&*+-/<=>?@"

Pronunciation = list[tuple[int, float]]  # (index in PHONES, seconds)


def pronunciations(words: list[str], per_word: int, seed: int) -> dict[str, list[Pronunciation]]:
    """Every word as `per_word` different voices say it."""
    rng, synthesizer = random.Random(seed), Synthesizer()
    said: dict[str, list[Pronunciation]] = {}
    for word in words:
        said[word] = []
        for _ in range(per_word):
            speech = synthesizer.say(word, voice(rng, TRAIN_VARIANTS))
            names = [(phone(name), start / speech.sample_rate) for name, start in speech.phonemes]
            said[word].append(
                [(PHONES.index(name), end - start) for (name, start), (_, end) in pairwise(names) if name != SILENCE]
            )
    return said


def frames(text: str, said: dict[str, list[Pronunciation]], rng: random.Random, difficulty: float = 1.0) -> list[int]:
    """The phone of every encoder frame (50 Hz) of `text`, misheard now and then: at difficulty 1 up to 30 % of them."""
    silence = PHONES.index(SILENCE)
    slips = difficulty * rng.uniform(0.0, 0.45) ** 1.5
    tempo = rng.uniform(0.75, 1.4)
    pausing = rng.choice([0.1, 0.1, 0.9])
    labels = [silence] * rng.randint(0, 8)
    for word in text.split():
        for name, seconds in rng.choice(said[word]):
            slip = rng.random()
            if slip < 0.25 * slips:
                continue
            if slip < slips:
                name = rng.randrange(len(PHONES))
            length = seconds * tempo * rng.uniform(0.7, 1.4) * FRAMING.frame_rate
            labels += [name] * int(length + rng.random())
            if rng.random() < 0.15 * slips:
                labels += [rng.randrange(len(PHONES))] * rng.randint(1, 4)
        if rng.random() < pausing:
            labels += [silence] * rng.randint(1, 15)
    labels += [silence] * rng.randint(0, 10)
    flips = 0.5 * slips
    return [rng.randrange(len(PHONES)) if rng.random() < flips else label for label in labels]


def blends(labels: list[int], stack: int) -> np.ndarray:
    """Frames -> prompt positions of `stack` frames each: the share of every phone in each, (A, phones) float32."""
    usable = len(labels) // stack * stack
    one_hot = np.eye(len(PHONES), dtype=np.float32)[np.array(labels[:usable], dtype=np.int64)]
    return one_hot.reshape(-1, stack, len(PHONES)).mean(1)


def sentence(rng: random.Random, vocabulary: list[str], difficulty: float = 1.0) -> str:
    """What the prompts say: grammar, digit strings, and words in no order so that listening pays, not guessing.

    Below difficulty 1 they are cut short, since one word is learned before twelve.
    """
    kind = rng.random()
    if kind < 0.25:
        text = corpus.word_salad(rng, vocabulary)
    elif kind < 0.5:
        text = " ".join(rng.choices(corpus.DIGITS, k=rng.randint(1, 8)))
    else:
        text = corpus.sentence(rng)
    return " ".join(text.split()[: 1 + int(12 * difficulty)])
