"""SpeechLM: RWKV([initial state], [adapter](encoder(audio))) -> text, the parts put together."""

# U utterances · S samples · A audio tokens · T positions of the packed batch · V vocabulary

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_speech import tiny
from rwkv_speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.batch import NOTHING_PREPARED, Prepared
from rwkv_speech.config import ModelConfig
from rwkv_speech.decoding.engine import greedy
from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models import splice
from rwkv_speech.models.adapter import Adapter
from rwkv_speech.models.checkpoint import Origin, Trained, find_checkpoint, load_trained, save_trained
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.state import Packing, State
from rwkv_speech.tokenizer import WorldTokenizer

logger = logging.getLogger(__name__)

# Fast speech is about 6 tokens a second; a decoder that still runs at this rate is lost.
TOKENS_PER_SECOND = 25
MIN_NEW_TOKENS = 16


@dataclass(frozen=True)
class Transcript:
    """What was heard: `text`, its token `ids`, the audio's `seconds`, and whether the text was `cut` at the limit."""

    text: str
    ids: list[int]
    seconds: float
    cut: bool


@dataclass(frozen=True)
class Parts:
    """Where the frozen parts come from and how the trained ones are shaped; what is empty is derived.

    "tiny" names the embedded default, for `load_model`, `encoder` and `vocab_file` alike.
    """

    load_model: str = ""
    encoder: str = ""
    vocab_file: str = ""
    stack: int | None = None
    adapter_hidden: int | None = None
    separator: str = "#"
    task: str = "asr"

    @classmethod
    def of(cls, config: ModelConfig) -> "Parts":
        """The parts that the flags name."""
        return cls(
            config.load_model,
            config.encoder,
            config.vocab_file,
            config.stack,
            config.adapter_hidden,
            config.separator,
            getattr(config, "task", "asr"),
        )

    def filled(self) -> "Parts":
        """Every part that was left empty takes what belongs to the base model."""
        embedded = self.load_model in ("", tiny.NAME)
        return replace(
            self,
            load_model=self.load_model or tiny.NAME,
            encoder=self.encoder or (tiny.NAME if embedded else "microsoft/wavlm-large"),
            vocab_file=self.vocab_file or (tiny.NAME if embedded else ""),
            stack=self.stack or (tiny.STACK if embedded else 5),
            adapter_hidden=self.adapter_hidden or (tiny.ADAPTER_HIDDEN if embedded else 2048),
        )


class SpeechLM(nn.Module):
    """A frozen encoder and language model with the two trained parts between them: adapter and initial state."""

    def __init__(self, encoder: SpeechEncoder, lm: RWKV6, tokenizer: WorldTokenizer, origin: Origin) -> None:
        super().__init__()
        self.encoder, self.lm, self.tokenizer, self.origin = encoder, lm, tokenizer, origin
        sizes = lm.sizes
        self.adapter = Adapter(encoder.width, sizes.C, origin.stack, origin.adapter_hidden)
        self.time_state = nn.Parameter(torch.zeros(sizes.n_layer, sizes.H, sizes.N, sizes.N))
        self.separator_id = _one_token(tokenizer, origin.separator)

    @classmethod
    def build(
        cls,
        parts: Parts,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        encoder_dtype: torch.dtype = torch.float32,
    ) -> "SpeechLM":
        """Frozen parts from their files, trained parts new; `dtype` is the language model's."""
        parts = parts.filled()
        base = tiny.BASE_MODEL if parts.load_model == tiny.NAME else Path(parts.load_model)
        vocab = tiny.VOCAB_FILE if parts.vocab_file == tiny.NAME else parts.vocab_file or None
        lm = RWKV6.from_pretrained(base, dtype, device)
        encoder_name = tiny.ENCODER if parts.encoder == tiny.NAME else parts.encoder
        encoder = SpeechEncoder.from_pretrained(encoder_name, encoder_dtype)
        tokenizer = WorldTokenizer(vocab)
        if tokenizer.vocab_size > lm.sizes.vocab:
            raise UserError(
                f"{base}: found {lm.sizes.vocab} embeddings, but the vocabulary {tokenizer.vocab_file} has ids up to "
                f"{tokenizer.vocab_size - 1}; give the vocabulary of this model with --vocab_file"
            )
        assert parts.stack is not None and parts.adapter_hidden is not None
        origin = Origin(
            base_model=parts.load_model,
            base_sha256=sha256_file(base),
            encoder=parts.encoder,
            vocab_file=parts.vocab_file,
            n_layer=lm.sizes.n_layer,
            n_embd=lm.sizes.C,
            stack=parts.stack,
            adapter_hidden=parts.adapter_hidden,
            separator=parts.separator,
            task=parts.task,
        )
        return cls(encoder.to(device), lm, tokenizer, origin).to(device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        parts: Parts | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        encoder_dtype: torch.dtype = torch.float32,
    ) -> "SpeechLM":
        """Load a run's folder, an own checkpoint, or a published `.pth`, which needs `parts`.

        Raises UserError if nothing is there, or if the base model is not the one that the checkpoint was trained on.
        """
        trained = load_trained(find_checkpoint(path))
        given = parts or Parts()
        if trained.origin is None and not given.load_model:
            raise UserError(
                f"{trained.path}: a published file does not name its base model; expected the model that it was "
                "trained on: give its path with --load_model"
            )
        model = cls.build(_parts_of(trained, given), dtype, device, encoder_dtype)
        model.load_trained(trained)
        return model.eval()

    def load_trained(self, trained: Trained) -> None:
        """Take over the adapter and the initial state; raises UserError where shapes or the base model differ."""
        if trained.origin is not None and trained.origin.base_sha256 != self.origin.base_sha256:
            raise UserError(
                f"{trained.path}: trained on a base model with SHA-256 {trained.origin.base_sha256[:12]}..., found "
                f"{self.origin.base_sha256[:12]}... in {self.origin.base_model}; give the same file with --load_model"
            )
        wanted = {**dict(self.adapter.named_parameters()), "time_state": self.time_state}
        found = {**trained.adapter, "time_state": trained.time_state}
        wrong = [
            f"{name}: found {tuple(found[name].shape)}, expected {tuple(x.shape)}"
            for name, x in wanted.items()
            if found[name].shape != x.shape
        ]
        if wrong:
            raise UserError(
                f"{trained.path}: does not fit {self.origin.base_model} with encoder {self.origin.encoder}:\n  "
                + "\n  ".join(wrong)
            )
        if trained.ignored:
            logger.warning("%s: left %d tensors that are not trained: %s", trained.path, len(trained.ignored),
                           ", ".join(trained.ignored))  # fmt: skip
        with torch.no_grad():
            for name, x in wanted.items():
                x.copy_(found[name])

    def save(self, path: Path, **metrics: Any) -> None:
        """Write the trained tensors, atomically, with what they were trained on and `metrics`."""
        save_trained(path, self.adapter.state_dict(), self.time_state, self.origin, metrics)

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters and the initial state: all that an optimizer may see."""
        yield from self.adapter.parameters()
        yield self.time_state

    def initial_state(self, batch: int) -> State:
        """The learned state at the start of `batch` sequences; the token shifts start at zero."""
        zero = self.lm.zero_state(batch)
        return zero._replace(wkv=self.time_state[:, None].expand(-1, batch, -1, -1, -1))

    def audio_tokens(
        self, waveforms: Tensor, num_samples: Tensor, prepared: Prepared = NOTHING_PREPARED
    ) -> tuple[Tensor, Tensor]:
        """waveforms (U, S), num_samples (U,) -> packed audio tokens (sum of A, C) and A of each."""
        if prepared.frames is not None and prepared.frame_lengths is not None:
            return self.adapter(prepared.frames.float(), prepared.frame_lengths)
        frames, lengths = self.encoder(waveforms, num_samples, prepared.normalised)
        return self.adapter(frames, lengths)

    def _hidden(self, spliced: splice.Spliced, audio: Tensor, keep_state: bool = True) -> tuple[Tensor, State]:
        packing = Packing.of(spliced.cu_seqlens).to(audio.device)
        spliced = spliced.to(audio.device)
        x = splice.fill(spliced, audio, self.lm.embed(spliced.token_ids))
        hidden, state = self.lm.hidden(x, self.initial_state(len(spliced.cu_seqlens) - 1), packing, keep_state)
        return hidden[0], state

    def forward(self, *batch: Any) -> tuple[Tensor, int]:
        """`loss_sum`, for engines that prepare a module before it runs."""
        return self.loss_sum(*batch)

    def loss_sum(
        self,
        waveforms: Tensor,
        num_samples: Tensor,
        text_ids: Tensor,
        text_lengths: Tensor,
        prepared: Prepared = NOTHING_PREPARED,
    ) -> tuple[Tensor, int]:
        """The summed loss of a batch, float32, and its number of target tokens (text and end of text).

        With lengths and text on the host, where they are wanted, nothing here waits for the device.
        """
        text_ids, text_lengths = text_ids.cpu(), text_lengths.cpu()
        audio, audio_lengths = self.audio_tokens(waveforms, num_samples, prepared)
        spliced = splice.splice(audio_lengths, text_ids, text_lengths, self.separator_id, self.tokenizer.eos_id)
        hidden, _ = self._hidden(spliced, audio, keep_state=False)
        at = (spliced.labels != splice.IGNORE).nonzero()[:, 0]
        targets, rows = (x.to(hidden.device, non_blocking=True) for x in (spliced.labels[at], at))
        return self.lm.head(hidden[rows], targets), len(at)

    @torch.no_grad()
    def generate(
        self,
        waveforms: Tensor,
        num_samples: Tensor,
        max_new_tokens: int | None = None,
        prepared: Prepared = NOTHING_PREPARED,
    ) -> tuple[list[list[int]], list[bool]]:
        """Greedy token ids of each utterance, and whether each was cut at `max_new_tokens` (25 a second)."""
        if len(num_samples) == 0:
            return [], []
        audio, audio_lengths = self.audio_tokens(waveforms, num_samples, prepared)
        spliced = splice.splice_prompt(audio_lengths, self.separator_id)
        hidden, state = self._hidden(spliced, audio)
        logits = self.lm.head(hidden[(spliced.cu_seqlens[1:] - 1).to(hidden.device)])
        limits = [
            max(MIN_NEW_TOKENS, int(TOKENS_PER_SECOND * samples / SAMPLE_RATE))
            if max_new_tokens is None
            else max_new_tokens
            for samples in num_samples.tolist()
        ]
        return greedy(self.lm, logits, state, limits, self.tokenizer.eos_id)

    def transcribe(
        self, audio: Sequence[str | Path | Tensor], batch_size: int = 8, max_new_tokens: int | None = None
    ) -> list[Transcript]:
        """Files, or waveforms (S,) at 16 kHz, -> a Transcript of each, in order; similar lengths share a batch."""
        device = self.time_state.device
        results: dict[int, Transcript] = {}
        waveforms = [x if isinstance(x, Tensor) else load_audio(x) for x in audio]
        order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            padded = nn.utils.rnn.pad_sequence([waveforms[i].float() for i in rows], batch_first=True).to(device)
            sizes = torch.tensor([len(waveforms[i]) for i in rows], device=device)
            for i, ids, cut in zip(rows, *self.generate(padded, sizes, max_new_tokens), strict=True):
                results[i] = Transcript(self.tokenizer.decode(ids), ids, len(waveforms[i]) / SAMPLE_RATE, cut)
        return [results[i] for i in range(len(waveforms))]


def _one_token(tokenizer: WorldTokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"--separator: {text!r} is {len(ids)} tokens, expected exactly one, such as '#'")
    return ids[0]


def _parts_of(trained: Trained, given: Parts) -> Parts:
    """What the checkpoint was trained with, where the caller did not say otherwise."""
    if trained.origin is None:
        return given
    origin = trained.origin
    return Parts(
        load_model=given.load_model or origin.base_model,
        encoder=given.encoder or origin.encoder,
        vocab_file=given.vocab_file or origin.vocab_file,
        stack=origin.stack,
        adapter_hidden=origin.adapter_hidden,
        separator=origin.separator,
        task=origin.task,
    )
