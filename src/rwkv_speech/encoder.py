"""The frozen speech encoder: WavLM, HuBERT or wav2vec2 from Hugging Face, waveforms in, frames out."""

# B batch · S samples · F frames · D encoder width

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rwkv_speech.audio import num_frames, receptive_field
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
        config: Any = model.config
        self.width: int = config.hidden_size
        # 400 for the published convolutions, others for others.
        self.min_samples = receptive_field(config.conv_kernel, config.conv_stride)
        self.eval()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "SpeechEncoder":
        """Load by hub id or from a folder; raises UserError naming the id or folder and the remedy."""
        from transformers import AutoConfig
        from transformers.utils import logging

        name = str(name_or_path)
        logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"encoder {name!r}: not a folder with a config.json, and not to be had from the Hugging Face "
                f"hub ({_first_line(error)}); give a folder, or an id such as microsoft/wavlm-large"
            ) from error
        if config.model_type not in _FAMILIES:
            raise UserError(f"encoder {name!r}: found model type {config.model_type!r}, expected one of {_FAMILIES}")
        if getattr(config, "add_adapter", False):
            raise UserError(f"encoder {name!r}: shortens its frames itself (add_adapter), expected one that does not")
        return cls(_load_model(name), name, _wants_normalised(name))

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
        waveforms = nn.functional.pad(waveforms, (0, max(0, self.min_samples - waveforms.shape[1])))
        x = normalise(waveforms, num_samples) if self.do_normalize else waveforms.float()
        config: Any = self.model.config
        # Whatever a trainer's autocast says, the waveform and the encoder stay in float32.
        with warnings.catch_warnings(), torch.autocast(x.device.type, enabled=False):
            # WavLM's attention has a float bias beside its mask, whatever it is given.
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
            if config.feat_extract_norm == "group":
                frames = self._forward_group_norm(x, num_samples, lengths)
            else:
                # One frame at least is attended, so that no row of the attention is empty.
                mask = length_mask(num_samples.clamp_min(self.min_samples), x.shape[1])
                frames = self.model(x, attention_mask=mask.long()).last_hidden_state
        return frames.float(), lengths

    def _forward_group_norm(self, x: Tensor, num_samples: Tensor, lengths: Tensor) -> Tensor:
        """The convolutions normalise over all that they are given: each utterance passes them alone."""
        model: Any = self.model
        features = [
            model.feature_extractor(row[None, : max(int(size), self.min_samples)])[0].transpose(0, 1)
            for row, size in zip(x, num_samples, strict=True)
        ]
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
        mask = length_mask(lengths.clamp_min(1), padded.shape[1])
        hidden = model.feature_projection(padded)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        frames: Tensor = model.encoder(hidden, attention_mask=mask).last_hidden_state
        return frames


def _load_model(name: str) -> nn.Module:
    """The model in float32; transformers would draw what the file lacks at random."""
    from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"encoder {name!r}: its weights cannot be read ({_first_line(error)}); copy or download it again"
        ) from error
    # The embedding that masks frames in pretraining is not in every published file, and never used here.
    missing = sorted(set(report["missing_keys"]) - {"masked_spec_embed"})
    if missing:
        raise UserError(
            f"encoder {name!r}: its weights lack {len(missing)} tensors, {missing[0]} first; expected all of "
            "them: copy or download it again"
        )
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _wants_normalised(name: str) -> bool:
    """The model's own preprocessor settings say so; without them, yes."""
    from transformers.utils.hub import cached_file

    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return bool(json.loads(Path(file).read_text()).get("do_normalize", True)) if file else True
