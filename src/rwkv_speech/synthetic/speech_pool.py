"""Synthetic utterances with a phone label for every encoder frame: what the tiny encoder is pretrained on."""

import random
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from rwkv_speech.audio import SAMPLE_RATE, Framing
from rwkv_speech.synthetic import corpus, lexicon, world
from rwkv_speech.synthetic.espeak import Speech, Synthesizer, Voice
from rwkv_speech.synthetic.phones import PHONES, SILENCE, spoken, voice_of
from rwkv_speech.tiny import CONV_KERNELS, CONV_STRIDES

# The tiny encoder's.
FRAMING = Framing.of_convolutions(CONV_KERNELS, CONV_STRIDES)
# 22,050 Hz and every rate used below share this factor, which keeps the resampling filters short.
_RATE_STEP = 450
# Shares of the languages; English has the most accents.
_LANGUAGES = {"en": 0.38, "es": 0.2, "fr": 0.14, "it": 0.14, "ru": 0.14}


@dataclass
class LabelledSpeech:
    """`waveform` (S,) int16 at 16 kHz in `lang`, and `labels` (F,) uint8, the PHONES at the frames' centres."""

    waveform: np.ndarray
    labels: np.ndarray
    lang: str


def frame_labels(speech: Speech, lang: str, num_samples: int) -> np.ndarray:
    """The phone at the centre of each of the frames that `num_samples` samples at 16 kHz give, (F,) uint8."""
    names, seconds = zip(*spoken(speech, lang), strict=True)
    first = speech.phonemes[0][1] / speech.sample_rate
    starts = (first + np.cumsum([0.0, *seconds[:-1]])) * num_samples * speech.sample_rate / len(speech.samples)
    ids = np.array([PHONES.index(SILENCE), *names], dtype=np.uint8)
    centres = np.arange(FRAMING.count(num_samples)) * FRAMING.samples_per_frame + FRAMING.centre
    return ids[np.searchsorted(starts, centres, side="right")]


def _joined_digits(synthesizer: Synthesizer, speaker: Voice, lang: str, rng: random.Random) -> Speech:
    """Digits spoken one at a time and joined with short pauses, as a dialled number is read out."""
    samples: list[np.ndarray] = []
    phonemes: list[tuple[str, int]] = []
    position = 0
    for number in rng.choices(lexicon.NUMBERS[:10], k=rng.randint(1, 6)):
        varied = Voice(speaker.name, speaker.rate + rng.randint(-20, 20), speaker.pitch + rng.randint(-8, 8))
        take = synthesizer.say(number[lang]["m"], varied)
        loud = np.flatnonzero(np.abs(take.samples) > 0.02 * np.abs(take.samples).max())
        end = int(loud[-1]) + 1
        gap = int(rng.uniform(0.02, 0.25) * take.sample_rate)
        samples += [take.samples[:end] * rng.uniform(0.5, 1.0), np.zeros(gap, np.float32)]
        phonemes += [(name, position + start) for name, start in take.phonemes if start < end] + [("", position + end)]
        position += end + gap
    return Speech(np.concatenate(samples), synthesizer.sample_rate, phonemes, [])


def _spliced_words(rng: random.Random, words: tuple[str, ...]) -> str:
    """Two to six words that do not exist: the beginning of one and the end of another."""
    pairs = (rng.sample(words, 2) for _ in range(rng.randint(2, 6)))
    return " ".join(a[: rng.randint(1, len(a))] + b[rng.randint(0, len(b) - 1) :] for a, b in pairs)


def _text(lang: str, rng: random.Random) -> str:
    """Made-up words, words in no order, and sentences."""
    kind = rng.random()
    if kind < 0.25:
        return corpus.made_up_words(rng) if lang == "en" and kind < 0.2 else _spliced_words(rng, world.words(lang))
    if kind < 0.55:
        return corpus.word_salad(rng, [*world.words(lang), *(corpus.words() if lang == "en" else ())])
    if lang == "en" and kind < 0.75:
        return corpus.sentence(rng)
    return world.draw(rng, rng.choice(["asr", "asr", "qa"]), lang).said


def _utterances(seed: int, seconds: float, variants: list[str]) -> list[LabelledSpeech]:
    torch.set_num_threads(1)
    rng, synthesizer = random.Random(seed), Synthesizer()
    pool: list[LabelledSpeech] = []
    said = 0.0
    while said < seconds:
        lang = rng.choices(list(_LANGUAGES), list(_LANGUAGES.values()))[0]
        speaker = voice_of(rng, lang, variants)
        digits = rng.random() < 0.12
        speech = (
            _joined_digits(synthesizer, speaker, lang, rng) if digits else synthesizer.say(_text(lang, rng), speaker)
        )
        # Played faster or slower, formants and all, as a shorter or longer vocal tract would sound.
        waveform = speech.waveform(rng.randint(30, 42) * _RATE_STEP)
        if not speech.phonemes or (loudest := waveform.abs().max()) < 1e-3:
            continue
        samples = (waveform / loudest * 32767).numpy().astype(np.int16)
        pool.append(LabelledSpeech(samples, frame_labels(speech, lang, len(samples)), lang))
        said += len(samples) / SAMPLE_RATE
    return pool


def speech_pool(hours: float, variants: list[str], seed: int, workers: int = 2) -> list[LabelledSpeech]:
    """About `hours` of labelled speech by `variants`; the same for the same arguments."""
    parts = 8
    jobs = [(seed * 1000 + part, hours * 3600 / parts, variants) for part in range(parts)]
    with get_context("spawn").Pool(workers) as processes:
        return [utterance for part in processes.starmap(_utterances, jobs, chunksize=1) for utterance in part]
