"""The frozen speech encoder: WavLM, HuBERT or wav2vec2 from Hugging Face, waveforms in, frames out."""

# B batch · S samples · F frames · D encoder width

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_speech.audio import MIN_SAMPLES, num_frames
from rwkv_speech.errors import UserError

_VARIANCE_FLOOR = 1e-7
_FAMILIES = ("wavlm", "hubert", "wav2vec2")


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """True inside each of the B lengths, (B, size)."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


def normalise(waveforms: Tensor, num_samples: Tensor) -> Tensor:
    """Zero mean and unit variance over each true length, zero in the padding; (B, S) float32."""
    mask = length_mask(num_samples, waveforms.shape[1])
    count = num_samples.clamp_min(1)[:, None]
    centred = (waveforms.float() - (waveforms.float() * mask).sum(1, keepdim=True) / count) * mask
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / torch.sqrt(variance + _VARIANCE_FLOOR)


class SpeechEncoder(nn.Module):
    """Waveforms (B, S) -> frames (B, F, D) at 50 Hz; never trains, never keeps a graph.

    An utterance's frames do not depend on what else is in its batch.
    """

    def __init__(self, model: nn.Module, name: str, do_normalize: bool = True) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self.do_normalize = do_normalize
        self.width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "SpeechEncoder":
        """Load by hub id or from a folder; raises UserError naming the id or folder and the remedy."""
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging

        name = str(name_or_path)
        logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"encoder {name!r}: not a folder with a config.json, and not to be had from the Hugging Face hub "
                f"({str(error).splitlines()[0]}); give a folder, or an id such as microsoft/wavlm-large and a network"
            ) from error
        if config.model_type not in _FAMILIES:
            raise UserError(f"encoder {name!r}: found model type {config.model_type!r}, expected one of {_FAMILIES}")
        model = AutoModel.from_pretrained(name, dtype=torch.float32)
        return cls(model, name, _wants_normalised(name))

    def train(self, mode: bool = True) -> "SpeechEncoder":
        """Stays in evaluation mode whatever a trainer asks for: no dropout, no layer drop, no masking."""
        return super().train(False)

    def frame_lengths(self, num_samples: Tensor) -> Tensor:
        """The number of frames of each utterance, (B,)."""
        config: Any = self.model.config
        return num_frames(num_samples, config.conv_kernel, config.conv_stride)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """waveforms (B, S) in -1..1, num_samples (B,) -> frames (B, F, D) float32 and their lengths (B,)."""
        lengths = self.frame_lengths(num_samples)
        # Shorter than one frame: the encoder sees silence added, and no frame of it is counted.
        waveforms = nn.functional.pad(waveforms, (0, max(0, MIN_SAMPLES - waveforms.shape[1])))
        x = normalise(waveforms, num_samples) if self.do_normalize else waveforms.float()
        config: Any = self.model.config
        if config.feat_extract_norm == "group":
            frames = self._forward_group_norm(x, num_samples, lengths)
        else:
            # One frame at least is attended, so that no row of the attention is empty.
            mask = length_mask(num_samples.clamp_min(MIN_SAMPLES), x.shape[1])
            frames = self.model(x, attention_mask=mask.long()).last_hidden_state
        return frames.float(), lengths

    def _forward_group_norm(self, x: Tensor, num_samples: Tensor, lengths: Tensor) -> Tensor:
        """The convolutions normalise over the whole length, padding and all: each utterance passes them alone."""
        model: Any = self.model
        features = [
            model.feature_extractor(row[None, : max(int(size), MIN_SAMPLES)])[0].transpose(0, 1)
            for row, size in zip(x, num_samples, strict=True)
        ]
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
        mask = length_mask(lengths.clamp_min(1), padded.shape[1])
        hidden = model.feature_projection(padded)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        frames: Tensor = model.encoder(hidden, attention_mask=mask).last_hidden_state
        return frames


def _wants_normalised(name: str) -> bool:
    """The model's own preprocessor settings say so; without them, yes."""
    from transformers.utils import cached_file

    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return bool(json.loads(Path(file).read_text()).get("do_normalize", True)) if file else True
