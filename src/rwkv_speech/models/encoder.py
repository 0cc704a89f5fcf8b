"""The frozen speech encoder: WavLM, HuBERT or wav2vec2 from Hugging Face, waveforms in, frames out."""

# B batch · S samples · F frames · D encoder width

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rwkv_speech.audio import SAMPLE_RATE, num_frames, receptive_field
from rwkv_speech.devices import autocast
from rwkv_speech.errors import UserError, first_line
from rwkv_speech.models.encoder_attention import fuse_attention

_VARIANCE_FLOOR = 1e-7
_FAMILIES = ("wavlm", "hubert", "wav2vec2")
_PREPROCESSOR = "preprocessor_config.json"
_DTYPES = (torch.float32, torch.bfloat16)
_NORMS = (nn.LayerNorm, nn.BatchNorm1d)
# The first convolution makes 6.5 MB of each second: this bounds it at 200 MB, whatever the batch.
_SAMPLES_AT_ONCE = 30 * SAMPLE_RATE
# It masks frames in pretraining, is not in every published file, and is never used here.
_UNUSED = "masked_spec_embed"
# What says where a configuration came from, not what it computes.
_PROVENANCE = ("transformers_version", "architectures", "dtype", "torch_dtype")


def length_mask(lengths: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """True inside each of the B lengths, (B, size), on `device`, else on that of the lengths."""
    device = device or lengths.device
    return torch.arange(size, device=device)[None] < lengths.to(device, non_blocking=True)[:, None]


def normalise(waveforms: Tensor, num_samples: Tensor) -> Tensor:
    """Zero mean and unit variance over each true length, zero in the padding; (B, S) float32."""
    mask = length_mask(num_samples, waveforms.shape[1], waveforms.device)
    count = num_samples.clamp_min(1)[:, None].to(waveforms.device, non_blocking=True)
    centred = (waveforms.float() - (waveforms.float() * mask).sum(1, keepdim=True) / count) * mask
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / torch.sqrt(variance + _VARIANCE_FLOOR)


class SpeechEncoder(nn.Module):
    """Waveforms (B, S) -> frames (B, F, D) at 50 Hz; never trains, never keeps a graph.

    An utterance's frames do not depend on what else is in its batch. Takes `model`, a transformers model, as its
    own: freezes it, and gives a WavLM fused attention.

    `dtype` bfloat16 has the transformer's matrices multiplied in bfloat16 at half the memory. Convolutions, norms
    and the sums between layers stay in float32, for rounding in these adds up: the frames of a random WavLM-Large
    differ by 0.6 % (relative RMS) from those of float32, instead of by 1.4 % with everything in bfloat16.

    Raises UserError for another dtype, and for a transformers whose WavLM is not the one known.
    """

    def __init__(
        self, model: nn.Module, name: str, do_normalize: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise UserError(f"encoder {name!r}: dtype {dtype}, expected one of {_DTYPES}")
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self.do_normalize = do_normalize
        self.dtype = dtype
        config: Any = model.config
        self.width: int = config.hidden_size
        # 400 for the published convolutions, others for others.
        self.min_samples = receptive_field(config.conv_kernel, config.conv_stride)
        self.samples_per_frame = math.prod(config.conv_stride)
        transformer: Any = model.encoder
        if config.model_type == "wavlm":
            fuse_attention(transformer)
        if dtype == torch.bfloat16:
            transformer.bfloat16()
            for module in transformer.modules():
                if isinstance(module, _NORMS):
                    module.float()
        self.eval()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> "SpeechEncoder":
        """Load by hub id or from a folder; raises UserError naming the id or folder and the remedy.

        Waveforms are normalised unless the model's preprocessor_config.json says otherwise; a model without
        that file has them normalised.
        """
        from huggingface_hub.utils import logging as hub_logging
        from transformers import AutoConfig
        from transformers.utils import logging

        name = str(name_or_path)
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()  # of a hub that does not answer, one error says enough
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"encoder {name!r}: not a folder with a config.json, and not to be had from the Hugging Face "
                f"hub ({first_line(error)}); give a folder, or an id such as microsoft/wavlm-large"
            ) from error
        if config.model_type not in _FAMILIES:
            raise UserError(f"encoder {name!r}: found model type {config.model_type!r}, expected one of {_FAMILIES}")
        if getattr(config, "add_adapter", False):
            raise UserError(f"encoder {name!r}: shortens its frames itself (add_adapter), expected one that does not")
        return cls(_load_model(name), name, _wants_normalised(name), dtype)

    def train(self, mode: bool = True) -> "SpeechEncoder":
        """Stays in evaluation mode whatever a trainer asks for: no dropout, no layer drop, no masking."""
        return super().train(False)

    def frame_lengths(self, num_samples: Tensor) -> Tensor:
        """The number of frames of each utterance, (B,)."""
        config: Any = self.model.config
        return num_frames(num_samples, config.conv_kernel, config.conv_stride)

    @torch.no_grad()
    def forward(
        self, waveforms: Tensor, num_samples: Tensor, normalised: bool = False, crop: bool = True
    ) -> tuple[Tensor, Tensor]:
        """waveforms (B, S) in -1..1, num_samples (B,) -> frames (B, F, D) float32 and their lengths (B,).

        Lengths are taken to the host and stay there. F is the longest utterance's, at least 1. `normalised`: the caller
        has done already what `do_normalize` asks for. What the frames past an utterance's length hold means nothing.
        """
        num_samples = num_samples.cpu()
        lengths = self.frame_lengths(num_samples)
        # Shorter than one frame: the encoder sees silence added, and no frame of it is counted.
        waveforms = nn.functional.pad(waveforms, (0, max(0, self.min_samples - waveforms.shape[1])))
        x = normalise(waveforms, num_samples) if self.do_normalize and not normalised else waveforms.float()
        model: Any = self.model
        # Whatever a trainer's autocast says, the waveform and the convolutions stay in float32.
        with autocast(x.device.type, enabled=False):
            rows = self._rows_at_once(x.shape[1], x.device)
            hidden = model.feature_projection(
                self._convolve(x, num_samples if crop else torch.full_like(num_samples, x.shape[1]), rows)
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        # One frame at least is attended, so that no row of the attention is empty.
        mask = length_mask(lengths.clamp_min(1), hidden.shape[1], hidden.device)
        with autocast(x.device.type, enabled=self.dtype == torch.bfloat16):
            frames = model.encoder(hidden, attention_mask=mask).last_hidden_state
        return frames.float(), lengths

    def _rows_at_once(self, samples: int, device: torch.device) -> int:
        """How many utterances pass the convolutions together; their padding is computed too."""
        config: Any = self.model.config
        # "group" norms run over all that they are given. On a CPU, utterances alone stay in its caches.
        if config.feat_extract_norm == "group" or device.type == "cpu":
            return 1
        return max(1, _SAMPLES_AT_ONCE // samples)

    def _convolve(self, x: Tensor, num_samples: Tensor, rows: int) -> Tensor:
        """(B, S) -> (B, F, width of the convolutions); what lies past an utterance's length means nothing."""
        model: Any = self.model
        sizes = [max(size, self.min_samples) for size in num_samples.tolist()]
        features: list[Tensor] = []
        for i in range(0, len(sizes), rows):
            features += model.feature_extractor(x[i : i + rows, : max(sizes[i : i + rows])]).transpose(1, 2)
        return nn.utils.rnn.pad_sequence(features, batch_first=True)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the frames: configuration, normalisation, precision and weights.

        The key of frames kept on disk: it does not depend on name, place, or device. Reads every weight once.
        """
        config: Any = self.model.config
        settings = {key: value for key, value in config.to_dict().items() if key not in _PROVENANCE and key[0] != "_"}
        settings |= {"do_normalize": self.do_normalize, "dtype": str(self.dtype)}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, x in sorted(self.model.state_dict().items()):
            if name != _UNUSED:
                digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
                digest.update(x.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _load_model(name: str) -> nn.Module:
    """The model in float32; transformers would draw what the file lacks at random."""
    from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"encoder {name!r}: its weights cannot be read ({first_line(error)}); copy or download it again"
        ) from error
    missing = sorted(set(report["missing_keys"]) - {_UNUSED})
    if missing:
        raise UserError(
            f"encoder {name!r}: its weights lack {len(missing)} tensors, {missing[0]} first; expected all of "
            "them: copy or download it again"
        )
    return model


def _wants_normalised(name: str) -> bool:
    """The model's own preprocessor settings say so; without them, yes."""
    try:
        file = _preprocessor_file(name)
        return bool(json.loads(file.read_text()).get("do_normalize", True)) if file else True
    except (OSError, ValueError) as error:
        raise UserError(
            f"encoder {name!r}: cannot read its {_PREPROCESSOR}, which says whether waveforms are normalised "
            f"({first_line(error)}); load the encoder once with the hub in reach, or give a folder"
        ) from error


def _preprocessor_file(name: str) -> Path | None:
    """None where the model has no such file; raises OSError where that cannot be known."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if Path(name).is_dir():
        file = Path(name) / _PREPROCESSOR
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(name, _PREPROCESSOR))
    except LocalEntryNotFoundError:
        # Out of reach; but it may have said before that it has no such file.
        if try_to_load_from_cache(name, _PREPROCESSOR) is _CACHED_NO_EXIST:
            return None
        raise
    except EntryNotFoundError:
        return None
