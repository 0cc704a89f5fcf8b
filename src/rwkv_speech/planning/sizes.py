"""The sizes that a plan is made for: of the model, which is built without values, and of a micro batch."""

# C channels · U utterances · F frames · A audio tokens · T positions of the packed batch

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch

from rwkv_speech import tiny
from rwkv_speech.audio import SAMPLE_RATE, num_audio_tokens, num_frames
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.tokenizer import WorldTokenizer

_HEAD_SIZE = 64


def world_sizes(n_layer: int, n_embd: int) -> RWKV6Sizes:
    """Those of a published RWKV-6 World model; raises UserError where `n_embd` is not a multiple of 64."""
    if n_embd % _HEAD_SIZE:
        raise UserError(f"--n_embd: found {n_embd}, expected a multiple of {_HEAD_SIZE}, the size of a head")
    ranks = (64, 128) if n_embd >= 4096 else (32, 64)
    return RWKV6Sizes(65536, n_layer, n_embd, n_embd // _HEAD_SIZE, int(3.5 * n_embd) // 32 * 32, *ranks)


BASE_MODELS = {
    "1.6B": world_sizes(24, 2048),
    "3B": world_sizes(32, 2560),
    "7B": world_sizes(32, 4096),
    "14B": world_sizes(61, 4096),
}


@dataclass(frozen=True)
class EncoderSizes:
    """An encoder's transformers configuration, in `json`."""

    json: str

    @classmethod
    def of(cls, config: Any) -> "EncoderSizes":
        """From the configuration itself."""
        return cls(config.to_json_string())

    @functools.cached_property
    def config(self) -> Any:
        """The configuration again."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**json.loads(self.json))

    def cut(self, layers: int) -> "EncoderSizes":
        """The same with so many layers."""
        return EncoderSizes(json.dumps(json.loads(self.json) | {"num_hidden_layers": layers}))

    def build(self, bf16: bool = False) -> SpeechEncoder:
        """The real encoder on the "meta" device."""
        from transformers import AutoModel

        with torch.device("meta"):
            model = AutoModel.from_config(self.config, dtype=torch.float32)
            return SpeechEncoder(model, "", dtype=torch.bfloat16 if bf16 else torch.float32)


WAVLM_LARGE = EncoderSizes(
    '{"model_type": "wavlm", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, '
    '"intermediate_size": 4096, "feat_extract_norm": "layer", "do_stable_layer_norm": true}'
)


@dataclass(frozen=True)
class Sizes:
    """What a SpeechLM without values is built from."""

    lm: RWKV6Sizes
    encoder: EncoderSizes
    stack: int = 5
    adapter_hidden: int = 2048

    def build(self, bf16: bool = False) -> SpeechLM:
        """The real model on the "meta" device, the language model in bfloat16 or in float32."""
        parts = Parts(stack=self.stack, adapter_hidden=self.adapter_hidden)
        with torch.device("meta"):
            lm = RWKV6(self.lm).to(torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
            return SpeechLM(self.encoder.build(), lm, WorldTokenizer(tiny.VOCAB_FILE), parts)

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """How many each part of the model has: "encoder", "lm", "adapter", "initial_states"."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.build().named_children()}

    @property
    def trained(self) -> int:
        """Parameters that the optimizer sees."""
        return self.parameters["adapter"] + self.parameters["initial_states"]

    def audio_tokens(self, seconds: float) -> int:
        """A of an utterance."""
        config = self.encoder.config
        return num_audio_tokens(
            num_frames(round(seconds * SAMPLE_RATE), config.conv_kernel, config.conv_stride), self.stack
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one GPU computes at a time: U utterances of so many `seconds`, with so many `text_tokens` each."""

    utterances: int
    seconds: float
    text_tokens: int

    def positions(self, sizes: Sizes) -> int:
        """T: audio tokens, separators and text, packed without padding."""
        return self.utterances * (sizes.audio_tokens(self.seconds) + 1 + self.text_tokens)
