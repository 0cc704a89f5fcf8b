"""The frozen speech encoder: WavLM, HuBERT, wav2vec2 or Whisper from Hugging Face, waveforms in, frames out."""

# B batch · S samples · F frames · D encoder width

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rwkv_speech.audio import Framing, length_mask
from rwkv_speech.devices import autocast
from rwkv_speech.errors import UserError, first_line
from rwkv_speech.models.encoder_wav2vec2 import UNUSED, Wav2Vec2Family, check_config
from rwkv_speech.models.encoder_whisper import WhisperFamily
from rwkv_speech.models.linear import PackedLinear
from rwkv_speech.models.parts import FrameOptions

_VARIANCE_FLOOR = 1e-7
_WHISPER, _FAMILIES = "whisper", ("wavlm", "hubert", "wav2vec2", "whisper")
_PREPROCESSOR = "preprocessor_config.json"
_DTYPES = (torch.float32, torch.bfloat16)
_NORMS = (nn.LayerNorm, nn.BatchNorm1d)
# Matrices with fewer rows or columns stay floats.
_LEAST_PACKED = 64
# What stands before an encoder's names in the file of a whole Whisper model.
_IN_WHISPER, _DECODER = r"^(model\.)?encoder\.", r"^(model\.decoder|decoder|proj_out)\."


def normalise(waveforms: Tensor, num_samples: Tensor) -> Tensor:
    """Zero mean and unit variance over each true length, zero in the padding; (B, S) float32."""
    mask = length_mask(num_samples, waveforms.shape[1], waveforms.device)
    count = num_samples.clamp_min(1)[:, None].to(waveforms.device, non_blocking=True)
    centred = (waveforms.float() - (waveforms.float() * mask).sum(1, keepdim=True) / count) * mask
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / torch.sqrt(variance + _VARIANCE_FLOOR)


class SpeechEncoder(nn.Module):
    """Waveforms (B, S) -> frames (B, F, D); never trains, never keeps a graph.

    An utterance's frames do not depend on what else is in its batch. Takes `model`, a transformers model, as its own
    and freezes it; of a Whisper model the encoder alone. `framing` says how many frames there are of so many samples,
    how far apart, and how short audio may be; `numbers_per_second` what the frames of a second hold.

    `dtype` bfloat16 has the transformer's matrices multiplied in bfloat16 at half the memory. Convolutions, norms
    and the sums between layers stay in float32, for rounding in these adds up: the frames of a random WavLM-Large
    differ by 0.6 % (relative RMS) from those of float32, instead of by 1.4 % with everything in bfloat16.

    `options` say what a frame is made of, and may have the transformer's matrices kept in 8 or 4 bits. The waveforms of
    a Whisper model are never normalised.

    Raises UserError for another dtype, for a padding of another family, and for layers that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        do_normalize: bool = True,
        dtype: torch.dtype = torch.float32,
        options: FrameOptions = FrameOptions(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise UserError(f"encoder {name!r}: dtype {dtype}, expected one of {_DTYPES}")
        config: Any = model.config
        is_whisper = config.model_type == _WHISPER
        if options.padding and not is_whisper:
            raise UserError(
                f"--encoder_padding: found {options.padding:g} with encoder {name!r} of type {config.model_type!r}, "
                "which takes audio at its own length; leave it out, or give a Whisper model"
            )
        if beyond := [number for number in options.layers if number > config.num_hidden_layers]:
            raise UserError(
                f"--encoder_layers: found {beyond[0]}, but encoder {name!r} has {config.num_hidden_layers}, expected "
                "numbers from 1 to that"
            )
        whole: Any = model
        self.model = (whole.encoder if is_whisper and hasattr(whole, "encoder") else model).requires_grad_(False).eval()
        family: WhisperFamily | Wav2Vec2Family
        family = WhisperFamily(self.model, options.padding or 0.0) if is_whisper else Wav2Vec2Family(self.model)
        self.family, self.framing = family, family.framing
        self.name = name
        self.do_normalize = do_normalize and not is_whisper
        self.dtype = dtype
        self.layers = options.layers
        self.width: int = config.hidden_size * max(1, len(self.layers))
        self.numbers_per_second: float = self.width * self.framing.frame_rate
        self._sha256_of_floats = ""  # of what is packed
        if options.quant and not any(x.is_meta for x in self.model.parameters()):
            self._sha256_of_floats = self.weights_sha256()
        packed = {
            name: PackedLinear(module, options.quant, dtype)
            for name, module in self.family.transformer.named_modules()
            if options.quant and isinstance(module, nn.Linear) and min(module.weight.shape) >= _LEAST_PACKED
        }
        if dtype == torch.bfloat16:
            self.family.transformer.bfloat16()
            for module in self.family.transformer.modules():
                if isinstance(module, _NORMS):
                    module.float()
        for module_name, module in packed.items():
            self.family.transformer.set_submodule(module_name, module)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype = torch.float32,
        options: FrameOptions = FrameOptions(),  # noqa: B008 (it is frozen)
    ) -> "SpeechEncoder":
        """Load by hub id or from a folder; raises UserError naming the id or folder and the remedy.

        Waveforms are normalised unless the model's preprocessor_config.json says otherwise; a model without
        that file has them normalised. Of a whole Whisper model the decoder is not read.
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
        check_config(name, config)
        normalised = config.model_type != _WHISPER and _wants_normalised(name)
        return cls(_load_model(name, config.model_type), name, normalised, dtype, options)

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        dtype: torch.dtype = torch.float32,
        options: FrameOptions = FrameOptions(),  # noqa: B008 (it is frozen)
    ) -> "SpeechEncoder":
        """An encoder of a transformers configuration, its weights drawn at random."""
        from transformers import AutoConfig, AutoModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        known: Any = AutoConfig.for_model(**config)
        model = WhisperEncoder(known) if known.model_type == _WHISPER else AutoModel.from_config(known)
        return cls(model.float(), "", dtype=dtype, options=options)

    def train(self, mode: bool = True) -> "SpeechEncoder":
        """Stays in evaluation mode whatever a trainer asks for: no dropout, no layer drop, no masking."""
        return super().train(False)

    def frame_lengths(self, num_samples: Tensor) -> Tensor:
        """The number of frames of each utterance, (B,)."""
        return self.framing.count(num_samples)

    @torch.no_grad()
    def forward(
        self, waveforms: Tensor, num_samples: Tensor, normalised: bool = False, crop: bool = True
    ) -> tuple[Tensor, Tensor]:
        """waveforms (B, S) in -1..1, num_samples (B,) -> frames (B, F, D) float32 and their lengths (B,).

        Lengths are taken to the host and stay there. F is the longest utterance's, at least 1; without `crop` that of S
        samples. `normalised`: the caller has done already what `do_normalize` asks for. What the frames past an
        utterance's length hold means nothing.
        """
        num_samples = num_samples.cpu()
        lengths = self.frame_lengths(num_samples)
        longest = max(1, int(lengths.max()) if crop else self.framing.count(waveforms.shape[1]))
        x = normalise(waveforms, num_samples) if self.do_normalize and not normalised else waveforms.float()
        # Whatever a trainer's autocast says, the waveform and the convolutions stay in float32.
        with autocast(x.device.type, enabled=False):
            hidden, heard = self.family.features(x, num_samples, crop)
        # One frame at least is attended, so that no row of the attention is empty.
        mask = length_mask(heard.clamp_min(1), hidden.shape[1], hidden.device)
        with autocast(x.device.type, enabled=self.dtype == torch.bfloat16):
            outputs = self.family.transform(hidden, mask, self.layers)
        scaled = [nn.functional.layer_norm(x.float(), x.shape[-1:]) for x in outputs] if self.layers else outputs
        frames = torch.cat(scaled, -1)
        return frames.float().view(len(x), -1, self.width)[:, :longest], lengths

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the frames: configuration, normalisation, precision and weights.

        The key of frames kept on disk: it does not depend on name, place, or device. Reads every weight once.
        """
        settings = self.family.settings() | {"do_normalize": self.do_normalize, "dtype": str(self.dtype)}
        settings |= {"layers": self.layers} if self.layers else {}  # frames kept without them stay known
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, x in sorted(self.model.state_dict().items()):
            if name != UNUSED:
                digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
                digest.update(x.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def check(self, wanted_sha256: str, checkpoint: Path) -> None:
        """Raises UserError where a checkpoint says which weights it was trained on, and these are others."""
        if wanted_sha256 and self.weights_sha256() != wanted_sha256:
            raise UserError(
                f"{checkpoint}: trained on an encoder with SHA-256 {wanted_sha256[:12]}..., found another in "
                f"{self.name}; give the same with --encoder"
            )

    def weights_sha256(self) -> str:
        """SHA-256 (hex) of the weights, rounded to bfloat16: the same whatever they are computed or stored in."""
        if self._sha256_of_floats:
            return self._sha256_of_floats
        digest = hashlib.sha256()
        for name, x in sorted(self.model.state_dict().items()):
            if name != UNUSED:
                digest.update(f"{name} {tuple(x.shape)}".encode())
                digest.update(x.cpu().to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class NoEncoder(SpeechEncoder):
    """In an encoder's place where text alone is read: nothing is loaded, and no adapter is built on its width of 0."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.name, self.width, self.numbers_per_second, self.layers = "", 0, 0.0, ()
        self.do_normalize, self.framing = False, Framing((), (), 0.0)

    def forward(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Raises UserError: there is audio after all."""
        raise UserError("found audio for a model that was loaded to read text alone; load it with its encoder")

    def fingerprint(self) -> str:
        """Nothing decides what is not there."""
        return ""

    def check(self, wanted_sha256: str, checkpoint: Path) -> None:
        """Any will do that is not there."""


def _load_model(name: str, model_type: str) -> nn.Module:
    """The model in float32, of Whisper the encoder; transformers would draw what the file lacks at random."""
    from transformers import AutoModel
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    class EncoderAlone(WhisperEncoder):
        """Does not mind a decoder in the file."""

    EncoderAlone._keys_to_ignore_on_load_unexpected = [_DECODER]
    kind, mapping = (EncoderAlone, {_IN_WHISPER: ""}) if model_type == _WHISPER else (AutoModel, None)
    loading: Any = kind.from_pretrained
    try:
        model, report = loading(name, dtype=torch.float32, output_loading_info=True, key_mapping=mapping)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"encoder {name!r}: its weights cannot be read ({first_line(error)}); copy or download it again"
        ) from error
    missing = sorted(set(report["missing_keys"]) - {UNUSED})
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
