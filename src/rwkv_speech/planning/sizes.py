"""The sizes that memory and time of a training step follow from: of the model, of a micro batch, of the set-up."""

# C channels · D encoder width · V vocabulary · U utterances · F frames · A audio tokens · T positions

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from rwkv_speech.audio import SAMPLE_RATE, num_audio_tokens, num_frames
from rwkv_speech.config import STRATEGIES
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import RWKV6Sizes

# The published base models.
BASE_MODELS = {
    "1.6B": RWKV6Sizes(65536, 24, 2048, 32, 7168, 32, 64),
    "3B": RWKV6Sizes(65536, 32, 2560, 40, 8960, 32, 64),
    "7B": RWKV6Sizes(65536, 32, 4096, 64, 14336, 64, 128),
    "14B": RWKV6Sizes(65536, 61, 4096, 64, 14336, 64, 128),
}


@dataclass(frozen=True)
class EncoderSizes:
    """What decides an encoder's cost; `bias_heads` is how many heads have an attention bias (or mask) of their own."""

    n_layer: int
    width: int
    ffn: int
    bias_heads: int
    conv_width: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    parameters: int

    @classmethod
    def of(cls, model: nn.Module) -> "EncoderSizes":
        """The sizes of a transformers model (`SpeechEncoder.model`)."""
        config: Any = model.config
        return cls(
            n_layer=config.num_hidden_layers,
            width=config.hidden_size,
            ffn=config.intermediate_size,
            bias_heads=config.num_attention_heads if config.model_type == "wavlm" else 1,
            conv_width=tuple(config.conv_dim),
            conv_kernel=tuple(config.conv_kernel),
            conv_stride=tuple(config.conv_stride),
            parameters=sum(p.numel() for p in model.parameters()),
        )

    def frames(self, seconds: float) -> int:
        """F of an utterance."""
        return num_frames(round(seconds * SAMPLE_RATE), self.conv_kernel, self.conv_stride)

    def conv_parameters(self) -> list[int]:
        """The weights of each convolution."""
        inputs = (1, *self.conv_width[:-1])
        return [a * b * kernel for a, b, kernel in zip(inputs, self.conv_width, self.conv_kernel, strict=True)]

    def conv_rates(self) -> list[float]:
        """What each convolution gives per second of audio."""
        return [SAMPLE_RATE / math.prod(self.conv_stride[: i + 1]) for i in range(len(self.conv_stride))]


WAVLM_LARGE = EncoderSizes(
    n_layer=24,
    width=1024,
    ffn=4096,
    bias_heads=16,
    conv_width=(512,) * 7,
    conv_kernel=(10, 3, 3, 3, 3, 2, 2),
    conv_stride=(5, 2, 2, 2, 2, 2, 2),
    parameters=315_453_120,
)


@dataclass(frozen=True)
class ModelSizes:
    """All sizes of a SpeechLM."""

    lm: RWKV6Sizes
    encoder: EncoderSizes
    stack: int = 5
    adapter_hidden: int = 2048

    def layer_matrices(self) -> int:
        """Weights of one layer of the language model that every position is multiplied with."""
        s = self.lm
        return 6 * s.C**2 + 2 * s.C * s.ffn + (10 * s.mix_rank + 2 * s.decay_rank) * s.C

    def lm_parameters(self) -> int:
        """Embedding, layers (each with 16 vectors of C), head, and the norms of both ends."""
        s = self.lm
        return s.n_layer * (self.layer_matrices() + 16 * s.C) + 2 * s.vocab * s.C + 4 * s.C

    def adapter_parameters(self) -> int:
        """Two matrices with their biases."""
        hidden = self.adapter_hidden
        return (self.encoder.width * self.stack + 1) * hidden + (hidden + 1) * self.lm.C

    def state_parameters(self) -> int:
        """The initial state: a matrix of each head and layer."""
        return self.lm.n_layer * self.lm.C * self.lm.N

    def trained_parameters(self) -> int:
        """All that the optimizer sees."""
        return self.adapter_parameters() + self.state_parameters()

    def audio_tokens(self, seconds: float) -> int:
        """A of an utterance."""
        return num_audio_tokens(self.encoder.frames(seconds), self.stack)


@dataclass(frozen=True)
class MicroBatch:
    """What one GPU computes at a time: U utterances, padded to `seconds` for the encoder, `text_tokens` in each."""

    utterances: int
    seconds: float
    text_tokens: int

    def positions(self, model: ModelSizes) -> int:
        """T: audio tokens, separators and text, packed without padding."""
        return self.utterances * (model.audio_tokens(self.seconds) + 1 + self.text_tokens)

    def targets(self) -> int:
        """Positions at which something is predicted: the text and its end."""
        return self.utterances * (self.text_tokens + 1)


@dataclass(frozen=True)
class Setup:
    """How a run computes.

    `bf16`: the language model in bfloat16, under autocast, which keeps norms and what is added to them in float32;
    `encoder_bf16` the same of the encoder. `cached_frames`: they come from a feature cache, the encoder rests.
    `native_wkv`: the compiled kernel rather than PyTorch's operations. What is trained is in float32 throughout.
    Raises UserError for a strategy that is not one of those of --strategy.
    """

    bf16: bool = True
    encoder_bf16: bool = False
    grad_cp: bool = False
    strategy: str = "auto"
    ranks: int = 1
    accumulate: int = 1
    native_wkv: bool = True
    cached_frames: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(f"--strategy: found {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")

    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return int(self.strategy[-1]) if self.strategy.startswith("deepspeed") else 0
