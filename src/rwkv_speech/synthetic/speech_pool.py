"""Synthetic utterances with a phone label for every encoder frame: what the tiny encoder is pretrained on."""

import random
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from rwkv_speech.audio import SAMPLE_RATE, SAMPLES_PER_FRAME, num_frames
from rwkv_speech.synthetic import corpus
from rwkv_speech.synthetic.espeak import Speech, Synthesizer, Voice
from rwkv_speech.synthetic.voices import PHONES, SILENCE, phone, voice
from rwkv_speech.tiny import CONV_KERNELS, CONV_STRIDES

# 22,050 Hz and every rate used below share this factor, which keeps the resampling filters short.
_RATE_STEP = 450
# The middle of the samples that one frame is computed from.
_FRAME_CENTRE = 430


@dataclass
class LabelledSpeech:
    """`waveform` (S,) int16 at 16 kHz and `labels` (F,) uint8, the index in PHONES at each frame's centre."""

    waveform: np.ndarray
    labels: np.ndarray


def frame_labels(speech: Speech, num_samples: int) -> np.ndarray:
    """The phone at the centre of each of the frames that `num_samples` samples at 16 kHz give, (F,) uint8."""
    starts = np.array([start for _, start in speech.phonemes]) * num_samples / max(len(speech.samples), 1)
    names = [SILENCE, *(phone(name) for name, _ in speech.phonemes)]
    ids = np.array([PHONES.index(name) for name in names], dtype=np.uint8)
    centres = np.arange(num_frames(num_samples, CONV_KERNELS, CONV_STRIDES)) * SAMPLES_PER_FRAME + _FRAME_CENTRE
    return ids[np.searchsorted(starts, centres, side="right")]


def _joined_digits(synthesizer: Synthesizer, speaker: Voice, rng: random.Random) -> Speech:
    """Digits spoken one at a time and joined with short pauses, as a dialled number is read out."""
    samples: list[np.ndarray] = []
    phonemes: list[tuple[str, int]] = []
    position = 0
    for word in rng.choices(corpus.DIGITS, k=rng.randint(1, 6)):
        varied = Voice(speaker.name, speaker.rate + rng.randint(-20, 20), speaker.pitch + rng.randint(-8, 8))
        take = synthesizer.say(word, varied)
        loud = np.flatnonzero(np.abs(take.samples) > 0.02 * np.abs(take.samples).max())
        end = int(loud[-1]) + 1
        gap = int(rng.uniform(0.02, 0.25) * take.sample_rate)
        samples += [take.samples[:end] * rng.uniform(0.5, 1.0), np.zeros(gap, np.float32)]
        phonemes += [(name, position + start) for name, start in take.phonemes if start < end] + [("", position + end)]
        position += end + gap
    return Speech(np.concatenate(samples), synthesizer.sample_rate, phonemes, [])


def _utterances(seed: int, seconds: float, variants: list[str]) -> list[LabelledSpeech]:
    torch.set_num_threads(1)
    rng, synthesizer, vocabulary = random.Random(seed), Synthesizer(), corpus.words()
    pool: list[LabelledSpeech] = []
    spoken = 0.0
    while spoken < seconds:
        speaker = voice(rng, variants)
        kind = rng.random()
        if kind < 0.15:
            speech = _joined_digits(synthesizer, speaker, rng)
        elif kind < 0.4:
            speech = synthesizer.say(corpus.made_up_words(rng), speaker)
        elif kind < 0.7:
            speech = synthesizer.say(corpus.word_salad(rng, vocabulary), speaker)
        else:
            speech = synthesizer.say(corpus.sentence(rng), speaker)
        # Played faster or slower, formants and all, as a shorter or longer vocal tract would sound.
        waveform = speech.waveform(rng.randint(30, 42) * _RATE_STEP)
        loudest = waveform.abs().max()
        if loudest < 1e-3:
            continue
        samples = (waveform / loudest * 32767).numpy().astype(np.int16)
        pool.append(LabelledSpeech(samples, frame_labels(speech, len(samples))))
        spoken += len(samples) / SAMPLE_RATE
    return pool


def speech_pool(hours: float, variants: list[str], seed: int, workers: int = 2) -> list[LabelledSpeech]:
    """About `hours` of labelled speech by `variants`; the same for the same arguments."""
    parts = 8
    jobs = [(seed * 1000 + part, hours * 3600 / parts, variants) for part in range(parts)]
    with get_context("spawn").Pool(workers) as processes:
        return [utterance for part in processes.starmap(_utterances, jobs, chunksize=1) for utterance in part]
