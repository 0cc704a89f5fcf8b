"""Whisper's encoder: a log-mel spectrogram of at most 30 s, two convolutions, a transformer."""

# B batch · W windows · S samples · M mel frames (100 Hz) · P positions (50 Hz) · D width

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_speech.audio import SAMPLE_RATE, Framing, length_mask

_HOP, _N_FFT = 160, 400
# One position is made of two mel frames.
_SAMPLES_PER_POSITION = 2 * _HOP
# Silence behind audio that is encoded at its own length: the model was trained on audio that ends in silence.
_SILENCE = SAMPLE_RATE // 2
_LOWEST, _RANGE = 1e-10, 8.0
# Of the configuration, what decides the frames.
_SETTINGS = ("activation_function", "d_model", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layers",
             "max_source_positions", "model_type", "num_mel_bins")  # fmt: skip


class WhisperFamily:
    """The encoder of a Whisper model, `model` being transformers' WhisperEncoder.

    Audio is encoded at its own length with half a second of silence behind it, at least `padding` seconds in all, and
    with the first positions, as many as it takes. Longer audio than the model takes, 30 s, is encoded in windows of
    30 s that follow each other, each as if it were alone; their frames are joined.
    """

    def __init__(self, model: nn.Module, padding: float = 0.0) -> None:
        self._model: Any = model
        config: Any = model.config
        self._padding, self._num_mels = padding, int(config.num_mel_bins)
        self._window = config.max_source_positions * _SAMPLES_PER_POSITION
        # Mel frames are centred on every 160th sample from the first on, positions on every second mel frame.
        self.framing = Framing((_SAMPLES_PER_POSITION,), (_SAMPLES_PER_POSITION,), 0.0)
        self.transformer: Any = self._model.layers

    def settings(self) -> dict[str, Any]:
        """What of the configuration decides the frames, and the padding."""
        config: dict[str, Any] = self._model.config.to_dict()
        return {name: config[name] for name in _SETTINGS} | {"padding": self._padding}

    def features(self, x: Tensor, num_samples: Tensor, crop: bool) -> tuple[Tensor, Tensor]:
        """(B, S) -> (W, P, D), W being B times the windows, and how many of P are of each, its silence with them."""
        x = x[:, : max(1, int(num_samples.max()))] if crop else x
        windows = max(1, -(-x.shape[1] // self._window))
        if windows > 1:
            x = nn.functional.pad(x, (0, windows * self._window - x.shape[1])).view(-1, self._window)
            before = self._window * torch.arange(windows)
            num_samples = (num_samples[:, None] - before).clamp(0, self._window).view(-1)
        x = x * length_mask(num_samples, x.shape[1], x.device)
        sizes = self._padded(num_samples)
        size = int(sizes.max()) if crop else int(self._padded(torch.tensor([x.shape[1]])))
        x = nn.functional.pad(x, (0, size - x.shape[1]))
        positions = (sizes // _HOP + 1) // 2
        return self._convolve(log_mel(x, sizes, self._num_mels), sizes // _HOP), positions

    def transform(self, hidden: Tensor, mask: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
        """What these layers give, else the last, (W, P, D) each; each position sees those of the mask (W, P)."""
        # A row of the mask for every position: what the fused attention takes on every device.
        seen = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
        outputs = list[Tensor]()
        for layer in self._model.layers:
            hidden = layer(hidden, seen)
            outputs.append(hidden)
        outputs[-1] = self._model.layer_norm(hidden)
        return [outputs[number - 1] for number in layers or (len(outputs),)]

    def _padded(self, num_samples: Tensor) -> Tensor:
        """The samples of a window with its silence."""
        return (num_samples + _SILENCE).clamp_min(round(self._padding * SAMPLE_RATE)).clamp_max(self._window)

    def _convolve(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """(W, mels, M) -> (W, P, D), as if each window ended where its `lengths` say."""
        model, mask = self._model, length_mask(lengths, mel.shape[2], mel.device)[:, None]
        x = nn.functional.gelu(model.conv1(mel * mask)) * mask
        x = nn.functional.gelu(model.conv2(x)).transpose(1, 2)
        embedded: Tensor = x + model.embed_positions.weight[: x.shape[1]]
        return embedded


def log_mel(waveforms: Tensor, num_samples: Tensor, num_mels: int) -> Tensor:
    """Whisper's log-mel spectrogram of each true length, (B, S) -> (B, num_mels, S // 160).

    As if each waveform ended after its `num_samples`: it is mirrored there, and the loudest frame, below which 80 dB
    are kept, is one of its own. What lies past its num_samples // 160 frames means nothing (openai/whisper, audio.py).
    """
    device, half = waveforms.device, _N_FFT // 2
    places = torch.arange(-half, waveforms.shape[1] + half, device=device).abs()[None]
    last = num_samples.to(device, non_blocking=True)[:, None] - 1
    mirrored = torch.where(places > last, 2 * last - places, places).clamp_min(0)
    x = waveforms.gather(1, mirrored.clamp_max(waveforms.shape[1] - 1))
    window = torch.hann_window(_N_FFT, device=device)
    spectrum = torch.stft(x, _N_FFT, _HOP, window=window, center=False, return_complex=True)[..., :-1]
    mel = _mel_filters(num_mels, device) @ (spectrum.real.square() + spectrum.imag.square())
    log = mel.clamp_min(_LOWEST).log10()
    outside = ~length_mask(num_samples // _HOP, log.shape[2], device)[:, None]
    loudest = log.masked_fill(outside, -torch.inf).amax((1, 2), keepdim=True)
    return (torch.maximum(log, loudest - _RANGE) + 4.0) / 4.0


@functools.lru_cache(8)
def _mel_filters(num_mels: int, device: torch.device) -> Tensor:
    """Slaney's filters, (num_mels, 201)."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(_N_FFT // 2 + 1, num_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, "slaney", "slaney")
    return torch.from_numpy(filters.T).float().to(device)
