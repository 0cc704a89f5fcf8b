import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from rwkv_speech.audio import AudioError
from rwkv_speech.data.augment import (
    Augment,
    Augmenter,
    add_noise,
    change_speed,
    change_volume,
    silence,
    take_out_bands,
)
from rwkv_speech.errors import UserError


def sine(hertz: float, seconds: float = 1.0) -> Tensor:
    return 0.3 * torch.sin(2 * math.pi * hertz * torch.arange(int(16_000 * seconds)) / 16_000)


def strongest_hertz(waveform: Tensor) -> float:
    return float(torch.fft.rfft(waveform).abs().argmax()) * 16_000 / len(waveform)


def energy(waveform: Tensor) -> float:
    return float(waveform.double().square().sum())


@pytest.fixture
def noise_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.uniform(-0.5, 0.5, 8_000), 16_000)
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "deep" / "b.flac", rng.uniform(-0.5, 0.5, 40_000), 8_000)
    return tmp_path


EVERY_CHANGE = Augment(
    speed=(0.9, 1.0, 1.1), volume_db=(-6.0, 6.0), time_masks=2, time_mask_seconds=0.1, freq_masks=2, freq_mask_hz=800
)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.07, 1.1])
def test_speed_scales_length_and_pitch(factor: float):
    changed = change_speed(sine(1_000), factor)
    assert len(changed) == math.ceil(round(16_000 * 100 / (100 * factor), 6))
    assert abs(strongest_hertz(changed) - 1_000 * factor) < 2


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_asked_ratio_of_energies(snr_db: float):
    torch.manual_seed(0)
    speech, noise = sine(500), torch.randn(16_000)
    added = add_noise(speech, noise, snr_db) - speech
    assert abs(10 * math.log10(energy(speech) / energy(added)) - snr_db) < 1e-3
    assert float(torch.nn.functional.cosine_similarity(added, noise, 0)) > 0.9999


def test_silent_noise_and_silent_speech_stay_finite():
    assert torch.equal(add_noise(sine(500), torch.zeros(16_000), 10.0), sine(500))
    assert add_noise(torch.zeros(16_000), sine(500), 10.0).isfinite().all()


def test_volume_is_in_decibels_and_clips():
    assert torch.allclose(change_volume(sine(500), -20.0), sine(500) / 10)
    assert change_volume(sine(500), 20.0).abs().max() == 1.0


def test_silence_changes_the_spans_only():
    masked = silence(sine(500) + 1, [(10.0, 20.0), (100.4, 130.6)])
    expected = sine(500) + 1
    expected[10:20] = 0
    expected[100:131] = 0
    assert torch.equal(masked, expected)


def test_bands_are_taken_out_and_the_rest_stays():
    kept, lost = sine(1_000), sine(3_000)
    changed = take_out_bands(kept + lost, [(2_500.0, 3_500.0)])
    assert energy(changed - kept) < 1e-3 * energy(lost)
    assert torch.allclose(take_out_bands(kept + lost, []), kept + lost, atol=1e-6)


@pytest.mark.parametrize("size", [1, 300, 3_584, 3_585, 10_000])
def test_blocks_make_one_convolution(size: int):
    torch.manual_seed(0)
    waveform, impulse = torch.randn(size), torch.zeros(1_025)
    impulse[512] = 1.0
    bands = [(1_000.0, 2_000.0), (6_000.0, 9_000.0)]
    kernel = take_out_bands(impulse, bands).double().numpy()
    expected = np.convolve(waveform.double().numpy(), kernel)[512 : 512 + size]
    np.testing.assert_allclose(take_out_bands(waveform, bands).numpy(), expected, atol=1e-5)


def test_very_short_audio_passes():
    for size in (1, 2, 256, 400):
        assert Augmenter(EVERY_CHANGE, 0)(torch.ones(size), 0, 0).isfinite().all()


def test_everything_is_off_by_default():
    assert Augment().flags_on == []
    assert torch.equal(Augmenter(Augment(), 0)(sine(500), 3, 4), sine(500))


def test_changes_depend_on_seed_epoch_and_index_only(noise_dir: Path):
    settings = Augment(**{**vars(EVERY_CHANGE), "noise_dir": str(noise_dir)})
    given = sine(500)

    def changed(seed: int, epoch: int, index: int) -> Tensor:
        return Augmenter(settings, seed)(given, epoch, index)

    keys = [(seed, epoch, index) for seed in (0, 2**40) for epoch in range(3) for index in range(3)]
    results = [changed(*key) for key in keys]
    assert torch.equal(given, sine(500))  # not changed in place
    assert all(torch.equal(changed(*key), result) for key, result in reversed(list(zip(keys, results, strict=True))))
    assert len({result.numpy().tobytes() for result in results}) == len(keys)


def test_each_change_draws_for_itself():
    both = [Augmenter(EVERY_CHANGE, 1).speed(epoch, index) for epoch in range(4) for index in range(5)]
    alone = Augmenter(Augment(speed=EVERY_CHANGE.speed), 1)
    assert both == [alone.speed(epoch, index) for epoch in range(4) for index in range(5)]
    assert set(both) == {0.9, 1.0, 1.1}
    assert all(len(alone(sine(500), 0, i)) == math.ceil(round(16_000 / alone.speed(0, i), 6)) for i in range(5))


def test_masks_have_the_asked_sizes():
    augmenter = Augmenter(Augment(time_masks=3, time_mask_seconds=0.05), 0)
    silenced = [int((augmenter(torch.ones(16_000), 0, i) == 0).sum()) for i in range(40)]
    assert max(silenced) <= 3 * 800 + 3 and len(set(silenced)) > 20 and sum(silenced) / 40 > 600


def test_noise_comes_from_all_files_and_repeats_when_short(noise_dir: Path):
    augmenter = Augmenter(Augment(noise_dir=str(noise_dir), noise_snr_db=(0.0, 0.0)), 0)
    silence_and_click = torch.zeros(20_000)
    silence_and_click[0] = 1.0
    periodic = 0
    for index in range(8):
        noise = augmenter(silence_and_click, 0, index)[1:]
        periodic += torch.allclose(noise[:8_000], noise[8_000:16_000], atol=1e-6)
    assert 0 < periodic < 8  # the file of half a second repeats, the one of five does not


def test_broken_noise_is_named(noise_dir: Path, tmp_path: Path):
    augmenter = Augmenter(Augment(noise_dir=str(noise_dir)), 0)
    for name in ("a.wav", "deep/b.flac"):
        (noise_dir / name).unlink()
    with pytest.raises(AudioError, match="no such audio file"):
        augmenter(sine(500), 0, 0)
    with pytest.raises(UserError, match="--noise_dir: .* holds no audio file"):
        Augmenter(Augment(noise_dir=str(noise_dir)), 0)
    (noise_dir / "c.wav").write_text("x")
    with pytest.raises(UserError, match=r"--noise_dir: .*c\.wav: cannot be decoded"):
        Augmenter(Augment(noise_dir=str(noise_dir)), 0)
    soundfile.write(noise_dir / "c.wav", np.zeros(10), 16_000)
    with pytest.raises(UserError, match=r"--noise_dir: .*c\.wav lasts 0\.001 s"):
        Augmenter(Augment(noise_dir=str(noise_dir)), 0)
