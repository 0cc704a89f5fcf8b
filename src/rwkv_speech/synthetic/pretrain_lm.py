"""Pretrains the tiny RWKV-6: noisy phone transcripts, "#", and then the words they stand for."""

import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from rwkv_speech.errors import exit_code
from rwkv_speech.flags import OutFlags, flag, parse
from rwkv_speech.models import splice
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.losses import token_loss_sum
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.state import Packing
from rwkv_speech.synthetic import corpus
from rwkv_speech.synthetic.phone_prompts import PHONE_LETTERS, Pronunciation, blends, frames, pronunciations, sentence
from rwkv_speech.synthetic.voices import PHONES
from rwkv_speech.tokenizer import WorldTokenizer

SEPARATOR = "#"
LAYERS, CHANNELS, HEADS = 3, 192, 3


def write_vocabulary(path: Path) -> None:
    """The 256 bytes, then every word with and without a blank before it, in the World vocabulary's format."""
    tokens: list[str | bytes] = [chr(byte) if byte < 128 else bytes([byte]) for byte in range(256)]
    tokens += [form for word in corpus.words() for form in (word, " " + word) if len(form) > 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i} {token!r} {len(token)}\n" for i, token in enumerate(tokens, start=1)))


@torch.no_grad()
def initialise(model: RWKV6) -> None:
    """RWKV-6's own initial values: slow to fast decay over the channels, mixes that vary with depth."""
    sizes = model.sizes
    channel = torch.arange(sizes.C) / (sizes.C - 1)
    nn.init.uniform_(model.emb.weight, -0.1, 0.1)
    nn.init.orthogonal_(model.head.weight, gain=0.5)
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        depth, left = layer / max(1, sizes.n_layer - 1), 1 - layer / sizes.n_layer
        att, ffn = block.att, block.ffn
        mix = torch.linspace(0, 1, sizes.C)
        for name, power in (("x", left), ("w", left), ("k", left), ("v", left), ("r", 0.5 * left), ("g", 0.5 * left)):
            getattr(att, f"time_maa_{name}").copy_(1 - mix**power)
        att.time_decay.copy_(-6 + 5 * channel ** (0.7 + 1.3 * depth))
        att.time_faaaa.copy_((0.5 * (1 - channel) + (torch.arange(sizes.C) % 3 - 1) * 0.1).view(sizes.H, sizes.N))
        for low_rank in (att.time_maa_w2, att.time_decay_w2, att.time_maa_w1, att.time_decay_w1):
            nn.init.uniform_(low_rank, -0.01, 0.01)
        for linear in (att.receptance, att.key, att.value, att.gate, ffn.key):
            nn.init.orthogonal_(linear.weight)
        for linear in (att.output, ffn.value, ffn.receptance):
            nn.init.normal_(linear.weight, std=0.02)
        ffn.time_maa_k.copy_(1 - mix**left)
        ffn.time_maa_r.copy_(1 - mix**left)


class PromptBatches:
    """Endless packed batches of prompts and sentences."""

    def __init__(self, tokenizer: WorldTokenizer, said: dict[str, list[Pronunciation]], seed: int) -> None:
        self.tokenizer, self.said, self.rng = tokenizer, said, random.Random(seed)
        self.vocabulary = corpus.words()
        self.separator = tokenizer.encode(SEPARATOR)[0]
        self.phone_ids = torch.tensor([tokenizer.encode(letter)[0] for letter in PHONE_LETTERS[: len(PHONES)]])

    def draw(self, utterances: int, difficulty: float) -> tuple[torch.Tensor, splice.Spliced]:
        """The blends of all prompts, (sum of A, phones), and the layout with the labels."""
        prompts, layout = [], list[list[splice.Segment]]()
        for _ in range(utterances):
            text = sentence(self.rng, self.vocabulary, difficulty)
            labels = frames(text, self.said, self.rng, difficulty)
            prompts.append(torch.from_numpy(blends(labels, self.rng.choice([2, 3, 3, 4]))))
            text_ids = splice.Text(self.tokenizer.encode(text))
            layout.append([splice.Audio(len(prompts[-1])), splice.Prompt([self.separator]), text_ids])
        return torch.cat(prompts), splice.splice(layout, 0)


def _loss(model: RWKV6, batches: PromptBatches, utterances: int, difficulty: float) -> tuple[torch.Tensor, float]:
    """Loss per target token of a new batch, and the share of targets guessed right."""
    prompt, spliced = batches.draw(utterances, difficulty)
    audio = prompt @ model.embed(batches.phone_ids)
    noise = 0.3 * difficulty * batches.rng.random() * audio.detach().std()
    audio = audio + noise * torch.randn_like(audio)
    x = splice.fill(spliced, audio, model.embed(spliced.token_ids))
    packing = Packing.of(spliced.cu_seqlens)
    hidden, _ = model.hidden(x, model.zero_state(utterances), packing)
    at = spliced.labels != splice.IGNORE
    logits, targets = model.head(hidden[0, at]), spliced.labels[at]
    right = float((logits.argmax(-1) == targets).float().mean())
    return token_loss_sum(logits, targets) / len(targets), right


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.pretrain_lm"""

    steps: int = flag(4000, "optimizer steps", at_least=1)
    utterances: int = flag(32, "prompts a step", at_least=1)
    lr: float = flag(2e-3, "learning rate", at_least=0)


def pretrain(config: Flags) -> dict[str, float]:
    """Trains from random weights, writes rwkv6.safetensors (bf16) and vocab.txt, returns what the card states."""
    out, steps = Path(config.out), config.steps
    torch.manual_seed(config.seed)
    started = time.time()
    write_vocabulary(out / "vocab.txt")
    tokenizer = WorldTokenizer(out / "vocab.txt")
    batches = PromptBatches(tokenizer, pronunciations(corpus.words(), 12, config.seed), config.seed)
    sizes = RWKV6Sizes(tokenizer.vocab_size, LAYERS, CHANNELS, HEADS, CHANNELS * 7 // 2, mix_rank=32, decay_rank=64)
    model = RWKV6(sizes)
    initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))) + 1e-3)
    )
    recent: list[float] = []
    for step in range(1, steps + 1):
        loss, right = _loss(model, batches, config.utterances, difficulty=min(1.0, step / (0.3 * steps)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], right]
        if step % 50 == 0 or step == steps:
            share, seconds = sum(recent) / len(recent), time.time() - started
            print(f"step {step}/{steps} loss {loss:.3f} right {share:.3f} {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == steps:
            weights = {name: x.bfloat16().contiguous() for name, x in model.state_dict().items()}
            save_file(weights, out / "rwkv6.safetensors")
    return {"steps": steps, "minutes": (time.time() - started) / 60, "tokens_right": sum(recent) / len(recent)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the language model's half of demo/pretrain-tiny.sh."""
    return exit_code(lambda: print(pretrain(parse(Flags, argv, __doc__ or ""))))


if __name__ == "__main__":
    sys.exit(main())
