"""WavLM, HuBERT and wav2vec2: convolutions over the waveform, then a transformer."""

# B batch · S samples · F frames · D width

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_speech.audio import SAMPLE_RATE, Framing
from rwkv_speech.errors import UserError
from rwkv_speech.models.encoder_attention import fuse_attention

# The first convolution makes 6.5 MB of each second: this bounds it at 200 MB, whatever the batch.
_SAMPLES_AT_ONCE = 30 * SAMPLE_RATE
# It masks frames in pretraining, is not in every published file, and is never used here.
UNUSED = "masked_spec_embed"
# What says where a configuration came from, not what it computes.
_PROVENANCE = ("transformers_version", "architectures", "dtype", "torch_dtype")


class Wav2Vec2Family:
    """What these models have in common; `model` is transformers' own, a WavLM's attention is fused.

    Raises UserError for a transformers whose WavLM is not the one known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        config: Any = model.config
        self.framing = Framing.of_convolutions(config.conv_kernel, config.conv_stride)
        transformer: Any = self._model.encoder
        self.transformer: Any = transformer
        # "group" norms run over all that they are given.
        self._is_alone = config.feat_extract_norm == "group"
        if config.model_type == "wavlm":
            fuse_attention(transformer)

    def settings(self) -> dict[str, Any]:
        """What of the configuration decides the frames."""
        config = self._model.config.to_dict()
        return {key: value for key, value in config.items() if key not in _PROVENANCE and key[0] != "_"}

    def features(self, x: Tensor, num_samples: Tensor, crop: bool) -> tuple[Tensor, Tensor]:
        """(B, S) -> (B, F, D) and how many of F are of an utterance; what lies past them means nothing."""
        # Shorter than one frame: the convolutions see silence added, and no frame of it is counted.
        x = nn.functional.pad(x, (0, max(0, self.framing.min_samples - x.shape[1])))
        sizes = num_samples if crop else torch.full_like(num_samples, x.shape[1])
        hidden = self._model.feature_projection(self.convolve(x, sizes, self.rows_at_once(x.shape[1], x.device)))
        return hidden[0] if isinstance(hidden, tuple) else hidden, self.framing.count(num_samples)

    def transform(self, hidden: Tensor, mask: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
        """What these layers give, else the last, (B, F, D) each; each frame sees those of the mask (B, F)."""
        outputs = list[Tensor]()

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in self.transformer.layers if layers]
        try:
            last: Tensor = self.transformer(hidden, attention_mask=mask).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        outputs[-1:] = [last]  # behind the norm that some models end in
        return [outputs[number - 1] for number in layers] or outputs

    def rows_at_once(self, samples: int, device: torch.device) -> int:
        """How many utterances pass the convolutions together; their padding is computed too."""
        # On a CPU, utterances alone stay in its caches.
        return 1 if self._is_alone or device.type == "cpu" else max(1, _SAMPLES_AT_ONCE // samples)

    def convolve(self, x: Tensor, num_samples: Tensor, rows: int) -> Tensor:
        """(B, S) -> (B, F, width of the convolutions); what lies past an utterance's length means nothing."""
        sizes = [max(size, self.framing.min_samples) for size in num_samples.tolist()]
        features: list[Tensor] = []
        for i in range(0, len(sizes), rows):
            features += self._model.feature_extractor(x[i : i + rows, : max(sizes[i : i + rows])]).transpose(1, 2)
        return nn.utils.rnn.pad_sequence(features, batch_first=True)


def check_config(name: str, config: Any) -> None:
    """Raises UserError for a model that shortens its frames itself."""
    if getattr(config, "add_adapter", False):
        raise UserError(f"encoder {name!r}: shortens its frames itself (add_adapter), expected one that does not")
