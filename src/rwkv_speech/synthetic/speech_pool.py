"""Synthetic utterances with a phone label for every encoder frame: what the tiny encoder is pretrained on."""

import random
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
import torchaudio.functional as F

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
    """`waveform` (S,) int16 at 16 kHz and `labels` (F,) uint8, the index in PHONES heard at each frame's centre."""

    waveform: np.ndarray
    labels: np.ndarray
    text: str


def frame_labels(speech: Speech, num_samples: int) -> np.ndarray:
    """The phone at the centre of each of the frames that `num_samples` samples at 16 kHz give, (F,) uint8."""
    starts = (
        np.array([start for _, start in speech.phonemes], dtype=np.float64) * num_samples / max(len(speech.samples), 1)
    )
    ids = np.array([PHONES.index(SILENCE), *(PHONES.index(phone(name)) for name, _ in speech.phonemes)], dtype=np.uint8)
    centres = np.arange(num_frames(num_samples, CONV_KERNELS, CONV_STRIDES)) * SAMPLES_PER_FRAME + _FRAME_CENTRE
    return ids[np.searchsorted(starts, centres, side="right")]


def _resampled(speech: Speech, factor_steps: int) -> torch.Tensor:
    """Plays the speech faster or slower, formants and all, as a shorter or longer vocal tract would sound."""
    return F.resample(torch.from_numpy(speech.samples), speech.sample_rate, factor_steps * _RATE_STEP)


def _joined_digits(synthesizer: Synthesizer, speaker: Voice, rng: random.Random) -> tuple[Speech, str]:
    """Digits spoken one at a time and joined with short pauses, as a dialled number is read out."""
    text = " ".join(rng.choices(corpus.DIGITS, k=rng.randint(1, 6)))
    samples: list[np.ndarray] = []
    phonemes: list[tuple[str, int]] = []
    position = 0
    for word in text.split():
        take = synthesizer.say(
            word, Voice(speaker.name, speaker.rate + rng.randint(-20, 20), speaker.pitch + rng.randint(-8, 8))
        )
        loud = np.flatnonzero(np.abs(take.samples) > 0.02 * np.abs(take.samples).max())
        end = int(loud[-1]) + 1
        gap = int(rng.uniform(0.02, 0.25) * take.sample_rate)
        samples += [take.samples[:end] * rng.uniform(0.5, 1.0), np.zeros(gap, np.float32)]
        phonemes += [(name, position + start) for name, start in take.phonemes if start < end] + [("", position + end)]
        position += end + gap
    return Speech(np.concatenate(samples), synthesizer.sample_rate, phonemes), text


def _utterances(args: tuple[int, float, list[str]]) -> list[LabelledSpeech]:
    seed, seconds, variants = args
    torch.set_num_threads(1)
    rng, synthesizer, vocabulary = random.Random(seed), Synthesizer(), corpus.words()
    pool: list[LabelledSpeech] = []
    heard = 0.0
    while heard < seconds:
        speaker = voice(rng, variants)
        kind = rng.random()
        if kind < 0.15:
            speech, text = _joined_digits(synthesizer, speaker, rng)
        else:
            text = (
                corpus.made_up_words(rng) if kind < 0.4
                else corpus.word_salad(rng, vocabulary) if kind < 0.7
                else corpus.sentence(rng)
            )  # fmt: skip
            speech = synthesizer.say(text, speaker)
        waveform = _resampled(speech, rng.randint(30, 42))
        if waveform.abs().max() < 1e-3:
            continue
        waveform = waveform / waveform.abs().max()
        labels = frame_labels(speech, len(waveform))
        pool.append(LabelledSpeech((waveform.numpy() * 32767).astype(np.int16), labels, text))
        heard += len(waveform) / SAMPLE_RATE
    return pool


def speech_pool(hours: float, variants: list[str], seed: int, workers: int = 2) -> list[LabelledSpeech]:
    """About `hours` of labelled speech by `variants`; the same for the same arguments."""
    parts = 8
    jobs = [(seed * 1000 + part, hours * 3600 / parts, variants) for part in range(parts)]
    with get_context("spawn").Pool(workers) as processes:
        return [utterance for part in processes.map(_utterances, jobs, chunksize=1) for utterance in part]
