import random

import pytest
import torch

from rwkv_speech.synthetic import nonspeech


@pytest.fixture(scope="module")
def voices() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw) for size in (8_000, 20_000, 1)]


def test_sounds_have_their_length_and_are_finite(voices: list[torch.Tensor]):
    rng = random.Random(0)
    for seconds in (0.00001, 0.02, 0.5, 3.0):
        for _ in range(40):
            sound = nonspeech.nonspeech(rng, seconds, voices)
            assert sound.shape == (max(1, round(16_000 * seconds)),) and sound.dtype == torch.float32
            assert sound.isfinite().all() and sound.abs().max() < 1


def test_sounds_repeat_by_seed_and_differ(voices: list[torch.Tensor]):
    first, again, other = (nonspeech.nonspeech(random.Random(seed), 1.0, voices) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_kind_comes_and_is_heard(monkeypatch: pytest.MonkeyPatch):
    called = set()
    for name in "_silence _noise _tones _hum _chirps _clicks _chords babble".split():
        kind = getattr(nonspeech, name)
        monkeypatch.setattr(nonspeech, name, lambda *args, name=name, kind=kind: called.add(name) or kind(*args))
    rng, voice = random.Random(0), torch.sin(torch.arange(4_000) / 5.0)
    for _ in range(100):
        nonspeech.nonspeech(rng, 0.1, [voice])
    assert len(called) == 8


def test_babble_is_of_many_voices(voices: list[torch.Tensor]):
    mixed = nonspeech.babble(random.Random(0), 16_000, [torch.ones(3_000)])
    assert mixed.min() > nonspeech.VOICES * 0.5  # each voice at all times, no softer than half


def test_a_sine_of_many_turns():
    t = nonspeech._times(32_000)
    expected = torch.sin(2 * torch.pi * 440.0 * torch.from_numpy(t))
    torch.testing.assert_close(torch.from_numpy(nonspeech._sine(440.0 * t)), expected, atol=1e-9, rtol=0)
