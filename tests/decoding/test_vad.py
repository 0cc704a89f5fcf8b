import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding.vad import BLOCK, WINDOW, Vad
from rwkv_speech.synthetic.corpus import sentence
from rwkv_speech.synthetic.espeak import Synthesizer, Voice


def probabilities(waveform: Tensor) -> Tensor:
    vad = Vad()
    return torch.cat([vad.block(block) for block in waveform.split(BLOCK)])


@pytest.fixture(scope="module")
def speech() -> Tensor:
    """Sentences of several voices in noise of several levels, some too quiet to be sure of."""
    synthesizer, rng = Synthesizer(), random.Random(0)
    parts = []
    for number, name in enumerate(["en-us", "en-us+f3", "en-us+m7", "en-us+klatt5"] * 2):
        said = synthesizer.say(sentence(rng), Voice(name)).waveform()
        parts += [0.5 ** (3 * number) * said, torch.zeros(2_000 * number)]
    waveform = torch.cat(parts)
    return waveform + 1e-3 * torch.randn(len(waveform), generator=torch.Generator().manual_seed(0))


def test_probabilities_equal_those_of_the_package(speech: Tensor):
    threads = torch.get_num_threads()
    import silero_vad

    torch.set_num_threads(threads)
    model = silero_vad.load_silero_vad()
    for _ in range(32):
        model(torch.zeros(WINDOW), 16_000)
    windows = torch.nn.functional.pad(speech, (0, -len(speech) % WINDOW)).split(WINDOW)
    expected = torch.tensor([model(window, 16_000).item() for window in windows])
    found = probabilities(speech)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4
    # Speech, silence, and what lies between them.
    shares = [float(part.float().mean()) for part in (expected > 0.9, expected < 0.1, abs(expected - 0.5) < 0.4)]
    assert min(shares) > 0.05, shares


def test_a_recording_may_end_in_any_place(speech: Tensor):
    whole = probabilities(speech)
    for samples in (1, WINDOW - 1, WINDOW, WINDOW + 1, BLOCK - 1, BLOCK, 5 * BLOCK + 3 * WINDOW + 7):
        found, windows = probabilities(speech[:samples]), samples // WINDOW
        assert len(found) == -(-samples // WINDOW) and torch.equal(found[:windows], whole[:windows])


def test_it_leaves_the_number_of_threads_as_it_is():
    code = (
        "import torch; torch.set_num_threads(3); from rwkv_speech.decoding.vad import Vad; Vad(); "
        "import sys; sys.exit(torch.get_num_threads() != 3)"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0
