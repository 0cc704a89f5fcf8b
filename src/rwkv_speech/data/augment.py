"""Changes to training audio: speed, noise, volume, masks in time and frequency.

What is done to an utterance is a pure function of (seed, epoch, utterance index): neither workers, ranks, the
batch nor a resumed run change it.
"""

# S samples

import copy
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# torchaudio is imported where it is used: it takes a second, and data that is not augmented never needs it.
from rwkv_speech.audio import SAMPLE_RATE, AudioError, audio_seconds, load_audio
from rwkv_speech.data.source import AUDIO_SUFFIXES
from rwkv_speech.errors import UserError

# The filter that takes bands out, which resolves 31 Hz, and the samples that are transformed at a time.
_TAPS, _BLOCK = 513, 4096
# Shorter noise would be a tone after its repetition; also, one sample at 16 kHz may be none at the file's rate.
_MIN_NOISE_SECONDS = 0.1


@dataclass(frozen=True)
class Augment:
    """Which changes are made; all are off by default; config.py says what their numbers may be.

    speed             factors, one of which is drawn; 1.1 is faster, and higher in pitch
    volume_db         lowest and highest gain; what then exceeds full scale is clipped, as in a recording
    noise_dir         folder of audio files, a stretch of one of which is added
    noise_snr_db      lowest and highest ratio of speech to noise
    time_masks        how many spans are silenced, each up to `time_mask_seconds` long
    freq_masks        how many bands are taken out, each up to `freq_mask_hz` wide
    """

    speed: tuple[float, ...] = ()
    volume_db: tuple[float, ...] = ()
    noise_dir: str = ""
    noise_snr_db: tuple[float, ...] = (5.0, 30.0)
    time_masks: int = 0
    time_mask_seconds: float = 0.2
    freq_masks: int = 0
    freq_mask_hz: float = 500.0

    @property
    def flags_on(self) -> list[str]:
        """The flags of the changes that are made."""
        names = ("speed", "volume_db", "noise_dir", "time_masks", "freq_masks")
        return [f"--{name}" for name in names if getattr(self, name)]


class Augmenter:
    """Makes the changes that `settings` ask for; raises UserError at once for a folder of noise that cannot be used."""

    def __init__(self, settings: Augment, seed: int | str) -> None:
        self.settings, self._seed = settings, seed
        self._noises = _list_noise(settings.noise_dir) if settings.noise_dir else []

    def with_seed(self, seed: int | str) -> "Augmenter":
        """The same with another seed, for utterances that count from 0 again."""
        changed = copy.copy(self)
        changed._seed = seed
        return changed

    @property
    def slowest(self) -> float:
        """The smallest factor that may be drawn: durations grow by its inverse at most."""
        return min(self.settings.speed, default=1.0)

    @property
    def fastest(self) -> float:
        """The largest factor that may be drawn."""
        return max(self.settings.speed, default=1.0)

    def speed(self, epoch: int, index: int | str) -> float:
        """The factor by which this utterance is faster in this epoch."""
        if not self.settings.speed:
            return 1.0
        return self._draws("speed", epoch, index).choice(self.settings.speed)

    def __call__(self, waveform: Tensor, epoch: int, index: int | str) -> Tensor:
        """(S,) -> (S / speed,), the given tensor unchanged; raises AudioError for noise that cannot be decoded."""
        settings = self.settings
        waveform = change_speed(waveform, self.speed(epoch, index))
        if self._noises:
            waveform = self._with_noise(waveform, self._draws("noise", epoch, index))
        if settings.volume_db:
            waveform = change_volume(waveform, self._draws("volume", epoch, index).uniform(*settings.volume_db))
        if settings.freq_masks:
            draws = self._draws("frequency", epoch, index)
            bands = _spans(draws, settings.freq_masks, settings.freq_mask_hz, SAMPLE_RATE / 2)
            waveform = take_out_bands(waveform, bands)
        if settings.time_masks:
            draws = self._draws("time", epoch, index)
            longest = settings.time_mask_seconds * SAMPLE_RATE
            waveform = silence(waveform, _spans(draws, settings.time_masks, longest, len(waveform)))
        return waveform

    def _draws(self, purpose: str, epoch: int, index: int | str) -> random.Random:
        # One stream for each purpose: turning one change on leaves the others as they were.
        return random.Random(f"{self._seed}/{epoch}/{index}/{purpose}")

    def _with_noise(self, waveform: Tensor, draws: random.Random) -> Tensor:
        path, seconds = draws.choice(self._noises)
        wanted = min(max(len(waveform) / SAMPLE_RATE, _MIN_NOISE_SECONDS), seconds)
        noise = load_audio(path, draws.uniform(0, seconds - wanted), wanted)
        repeats = -(-len(waveform) // len(noise))
        return add_noise(waveform, noise.repeat(repeats)[: len(waveform)], draws.uniform(*self.settings.noise_snr_db))


def change_speed(waveform: Tensor, factor: float) -> Tensor:
    """(S,) -> (S / factor,): as if the recording ran faster, pitch included."""
    from torchaudio.functional import resample

    return resample(waveform, round(100 * factor), 100)


def add_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Add `noise` (S,) to (S,), scaled to this ratio of energies; nothing if the noise is silent."""
    from torchaudio.functional import add_noise as add

    if not noise.any():
        return waveform
    return add(waveform, noise, torch.tensor(snr_db))


def change_volume(waveform: Tensor, gain_db: float) -> Tensor:
    """Amplify (S,) by `gain_db` and clip it to -1..1."""
    from torchaudio.functional import gain

    return gain(waveform, gain_db).clamp(-1.0, 1.0)


def silence(waveform: Tensor, spans: list[tuple[float, float]]) -> Tensor:
    """Set the samples from `first` to `last` of each span to zero."""
    masked = waveform.clone()
    for first, last in spans:
        masked[round(first) : round(last)] = 0
    return masked


def take_out_bands(waveform: Tensor, bands: list[tuple[float, float]]) -> Tensor:
    """Take the frequencies from `low` to `high` Hz of each band out of (S,), with a linear-phase filter.

    Overlap-save convolution: 1 ms for 12 s, where torchaudio's fftconvolve takes 11 ms, and its band-stop filters
    (biquads) without its compiled part 3 s.
    """
    hertz = torch.fft.rfftfreq(_TAPS, 1 / SAMPLE_RATE)
    gains = torch.ones(len(hertz))
    for low, high in bands:
        gains[(low <= hertz) & (hertz < high)] = 0
    kernel = torch.fft.irfft(gains, _TAPS).roll(_TAPS // 2) * torch.hann_window(_TAPS, periodic=False)
    step = _BLOCK - _TAPS + 1  # of each block, so much is not wrapped around
    count = -(-len(waveform) // step)
    before, size = _TAPS // 2, count * step + _TAPS - 1
    padded = torch.nn.functional.pad(waveform, (before, size - before - len(waveform)))
    spectra = torch.fft.rfft(padded.unfold(0, _BLOCK, step)) * torch.fft.rfft(kernel, _BLOCK)
    return torch.fft.irfft(spectra, _BLOCK)[:, _TAPS - 1 :].flatten()[: len(waveform)]


def _spans(draws: random.Random, count: int, longest: float, size: float) -> list[tuple[float, float]]:
    """Draw `count` spans of up to `longest` inside 0..`size`."""
    spans = []
    for _ in range(count):
        length = draws.uniform(0, min(longest, size))
        first = draws.uniform(0, size - length)
        spans.append((first, first + length))
    return spans


def _list_noise(folder: str) -> list[tuple[str, float]]:
    """Each audio file under the folder and its seconds, sorted by path, so that the order is that of no file system."""
    root = Path(folder)
    files = sorted(
        (path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    if not files:
        raise UserError(
            f"--noise_dir: {folder} holds no audio file; expected any of: {' '.join(sorted(AUDIO_SUFFIXES))}"
        )
    noises = []
    for file in files:
        try:
            seconds = audio_seconds(file)
        except AudioError as error:
            raise UserError(f"--noise_dir: {error}: mend or remove it") from error
        if seconds < _MIN_NOISE_SECONDS:
            raise UserError(
                f"--noise_dir: {file} lasts {seconds:.3f} s, expected {_MIN_NOISE_SECONDS} s at least: remove it"
            )
        noises.append((str(file), seconds))
    return noises
