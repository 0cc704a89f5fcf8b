"""What is no speech gives no words, on the whole road and with its defaults, and speech loses none by it."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.decoding.transcribe import SpeechLM

ROOT = Path(__file__).parents[2]
COUNT = 20  # of each kind
SECONDS = (1.0, 12.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quickstart: the CTC head needs no good language model beside it."""
    folder = tmp_path_factory.mktemp("noise") / "run"
    settings = {"proj_dir": folder, "train_utterances": 400, "test_utterances": 60, "epoch_count": 3}
    mine = {"venv": "none", "PYTHON": sys.executable, **settings}
    variables = os.environ | {name: str(value) for name, value in mine.items()}
    subprocess.run(["bash", str(ROOT / "demo" / "quickstart.sh")], env=variables, check=True, capture_output=True)
    return folder


def speech(run: Path) -> list[Tensor]:
    """Recordings of voices that were not trained on."""
    lines = (run / "data" / "test.jsonl").read_text().splitlines()
    return [load_audio(run / "data" / json.loads(line)["audio_filepath"]) for line in lines]


def coloured(noise: np.random.Generator, size: int, exponent: float) -> np.ndarray:
    """Noise whose power falls with frequency by an exponent: 0 white, 1 pink, 2 brown; of power 1."""
    spectrum = np.fft.rfft(noise.standard_normal(size))
    found = np.fft.irfft(spectrum * np.maximum(1, np.arange(len(spectrum))) ** (-exponent / 2), size)
    return found / found.std()


def sounds(kind: str, run: Path) -> list[Tensor]:
    rng, noise, voices = random.Random(kind), np.random.default_rng(3), speech(run)
    found = []
    for number in range(COUNT):
        size = int(SAMPLE_RATE * rng.uniform(*SECONDS))
        if kind == "silence":
            sound = (number > 0) * 10 ** rng.uniform(-6, -3) * noise.standard_normal(size)
        elif kind == "noise":
            sound = 10 ** rng.uniform(-3, -0.7) * coloured(noise, size, number % 3)
        elif kind == "tones":
            turns = [rng.uniform(50, 4000) * np.arange(size) / SAMPLE_RATE for _ in range(1 + number % 4)]
            sound = rng.uniform(0.05, 0.6) * np.mean([np.sin(2 * math.pi * x) for x in turns], 0)
        else:  # babble of eight voices and more: of fewer words can be heard
            lanes = [torch.cat(rng.choices(voices, k=14)).numpy() for _ in range((8, 10, 12, 16)[number % 4])]
            sound = np.sum([np.roll(lane, rng.randrange(len(lane)))[:size] for lane in lanes], 0)
            sound = rng.uniform(0.05, 0.2) * sound / sound.std()
        found.append(torch.from_numpy(sound.astype(np.float32)))
    return found


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["silence", "noise", "tones", "babble"])
def test_what_is_no_speech_gives_no_words(run: Path, kind: str):
    model = SpeechLM.from_pretrained(run)
    assert [found.text for found in model.transcribe(sounds(kind, run))] == [""] * COUNT


@pytest.mark.soak
def test_speech_loses_no_word(run: Path):
    model, recordings = SpeechLM.from_pretrained(run), speech(run)
    found = model.transcribe(recordings, no_speech_threshold=1.0, vad="none", temperature=0.0)
    by_default = model.transcribe(recordings, temperature=0.0)
    words = [sum(len(x.text.split()) for x in texts) for texts in (found, by_default)]
    assert abs(words[1] - words[0]) <= 0.01 * words[0] and all(x.text for x in by_default)
