"""Sounds without words: silence, noise, tones, hum, chirps, clicks, chords, and babble of many voices."""

# S samples

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE

Floats = NDArray[np.float64]
VOICES = 6  # fewer voices at a time may leave words that can be heard
_LOUDEST_DB, _SOFTEST_DB = -3.0, -50.0


def nonspeech(rng: random.Random, seconds: float, voices: Sequence[Tensor]) -> Tensor:
    """A sound of one kind, (S,) float32 at a random level; `voices` are recordings that babble is made of."""
    noise = np.random.default_rng(rng.getrandbits(64))
    kinds = [_silence, _noise, _noise, _tones, _hum, _chirps, _clicks, _chords]
    size = max(1, round(seconds * SAMPLE_RATE))
    # A third is babble, which is closest to speech.
    if voices and rng.random() < 0.35:
        sound = babble(rng, size, voices)
    else:
        sound = rng.choice(kinds)(rng, noise, size)
        if rng.random() < 0.3:  # as sounds come and go
            sound = sound * _swell(rng, size)
    peak = np.abs(sound).max(initial=0.0)
    gain = 10 ** (rng.uniform(_SOFTEST_DB, _LOUDEST_DB) / 20) / peak if peak else 0.0
    floor = 10 ** (rng.uniform(-100, -60) / 20) * noise.standard_normal(size)
    return torch.from_numpy((sound * gain + floor * rng.choice([0, 1])).astype(np.float32))


def babble(rng: random.Random, size: int, voices: Sequence[Tensor]) -> Floats:
    """(S,): pieces of `voices`, half of them backwards, each cut where it may, six or more at a time."""
    mixed = np.zeros(size)
    for _ in range(rng.randint(VOICES, 2 * VOICES)):
        at = 0
        while at < size:
            voice = rng.choice(voices).numpy()
            voice = voice[:: rng.choice([-1, 1])]
            piece = np.roll(voice, rng.randrange(max(1, len(voice))))[: size - at]
            level = math.sqrt(float(np.square(piece).mean()) + 1e-9) if len(piece) else 1.0
            mixed[at : at + len(piece)] += piece / level * rng.uniform(0.5, 1.0)
            at += max(1, len(piece))
    return mixed


def _times(size: int) -> Floats:
    return np.arange(size) / SAMPLE_RATE


def _sine(cycles: Floats) -> Floats:
    """The sine of so many turns; of small angles, for that of large ones takes thirty times as long."""
    return _harmonics(cycles, [1.0])


def _harmonics(cycles: Floats, strengths: Sequence[float]) -> Floats:
    """The sum of the sines of once, twice ... so many turns."""
    turn = np.exp(2j * np.pi * (cycles - np.floor(cycles)))
    wave, sound = np.ones_like(turn), np.zeros(len(cycles))
    for strength in strengths:
        wave *= turn
        sound += strength * wave.imag
    return sound


def _silence(rng: random.Random, noise: np.random.Generator, size: int) -> Floats:
    return np.zeros(size)


def _noise(rng: random.Random, noise: np.random.Generator, size: int) -> Floats:
    """White, pink or brown, or in between, perhaps of one band."""
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    colour = rng.choice([0, 0.5, 1, rng.random()])
    spectrum = np.fft.rfft(noise.standard_normal(size)) / np.maximum(hertz, 20.0) ** colour
    if rng.random() < 0.4:
        middle, width = rng.uniform(100, 6000), rng.uniform(50, 3000)
        spectrum = spectrum * np.exp(-(((hertz - middle) / width) ** 2))
    return np.fft.irfft(spectrum, size)


def _tones(rng: random.Random, noise: np.random.Generator, size: int) -> Floats:
    """Up to three steady tones, perhaps beating or wavering."""
    t = _times(size)
    waver = rng.choice([0.0, rng.uniform(0, 5)]) * _sine(rng.uniform(2, 8) * t)
    pitches = [math.exp(rng.uniform(math.log(80), math.log(6000))) for _ in range(rng.randint(1, 3))]
    return sum((_sine(pitch * t + waver) for pitch in pitches), np.zeros(size))


def _hum(rng: random.Random, noise: np.random.Generator, size: int) -> Floats:
    """A mains' or a motor's hum with its harmonics."""
    base = rng.choice([50.0, 60.0, rng.uniform(30, 250)])
    return _harmonics(base * _times(size), [rng.uniform(-1, 1) / k for k in range(1, rng.randint(3, 30))])


def _chirps(rng: random.Random, noise: np.random.Generator, size: int) -> Floats:
    """Tones that rise or fall, again and again: sirens, birds."""
    t, period = _times(size), rng.uniform(0.05, 3.0)
    low, high = sorted(rng.uniform(100, 6000) for _ in range(2))
    place = (t / period) % 1.0 if rng.random() < 0.5 else np.abs(2 * ((t / period) % 1.0) - 1)
    pitch = low + (high - low) * place
    return _sine(np.cumsum(pitch) / SAMPLE_RATE) * (place < rng.uniform(0.3, 1.0))


def _clicks(rng: random.Random, noise: np.random.Generator, size: int) -> Floats:
    """Short knocks that ring out, regular or not."""
    sound, at, regular = np.zeros(size), 0, rng.choice([0, rng.randint(800, 16_000)])
    ring, pitch = rng.uniform(0.001, 0.08), rng.uniform(100, 4000)
    t = _times(round(6 * ring * SAMPLE_RATE) + 1)
    knock = np.exp(-t / ring) * (_sine(pitch * t) + rng.random() * noise.standard_normal(len(t)))
    while at < size:
        piece = knock[: size - at]
        sound[at : at + len(piece)] += piece * rng.uniform(0.3, 1.0)
        at += regular or rng.randint(400, 16_000)
    return sound


def _chords(rng: random.Random, noise: np.random.Generator, size: int) -> Floats:
    """Notes of an instrument with harmonics and decay, in chords and runs."""
    sound, beat = np.zeros(size), rng.randint(1_600, 12_000)
    root, timbre = rng.uniform(65, 400), [rng.random() / k for k in range(1, rng.randint(2, 10))]
    decay = rng.uniform(0.05, 0.7)
    for at in range(0, size, beat):
        for _ in range(rng.randint(0, 4)):
            t = _times(min(size - at, round(3 * decay * SAMPLE_RATE) + 1))
            pitch = root * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 11, 12, 16, 19]) / 12)
            sound[at : at + len(t)] += _harmonics(pitch * t, timbre) * np.exp(-t / decay) * rng.uniform(0.3, 1.0)
        if rng.random() < 0.3:  # a drum
            length = min(size - at, 1_600)
            sound[at : at + length] += noise.standard_normal(length) * np.exp(-_times(length) / 0.02)
    return sound


def _swell(rng: random.Random, size: int) -> Floats:
    """A gain between 0 and 1 that changes slowly."""
    points = [rng.random() for _ in range(max(2, size // 8000))]
    gains: Floats = np.interp(np.linspace(0, len(points) - 1, size), range(len(points)), points)
    return gains
