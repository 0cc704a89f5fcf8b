"""Pretrains a small RWKV-6 or RWKV-7: text or a small world, and noisy phone transcripts, "#", and what they say."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rwkv_speech.devices import autocast
from rwkv_speech.errors import UserError, exit_code
from rwkv_speech.files import write_atomically, write_text_atomically
from rwkv_speech.flags import OutFlags, flag, parse
from rwkv_speech.models import splice
from rwkv_speech.models.base import RWKV6Sizes, RWKV7Sizes
from rwkv_speech.models.losses import token_loss_sum
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.rwkv7 import RWKV7
from rwkv_speech.models.state import Packing
from rwkv_speech.synthetic import rwkv6_init, rwkv7_init
from rwkv_speech.synthetic.lesson_batches import Batch, LessonBatches
from rwkv_speech.synthetic.lessons import Lessons, MixedLessons, TextLessons
from rwkv_speech.synthetic.phones import PHONES
from rwkv_speech.synthetic.texts import read_texts
from rwkv_speech.synthetic.vocabulary import write_vocabulary
from rwkv_speech.synthetic.world_lessons import WorldLessons
from rwkv_speech.tokenizer import WorldTokenizer

_HEAD_SIZE = 64
_VOCABULARY, _RESUME, _CARD = "vocab.txt", "resume.pt", "CARD.md"
WORLD_VOCABULARY = "world"
# What a resumed run may have otherwise.
_FREE = ("out", "steps", "save_steps", "device", "compile", "threads")


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.pretrain_lm"""

    texts: str = flag("", "folders of .txt files, separated by commas, each with @WEIGHT if it is to come more often")
    world: float = flag(0.0, "share of lessons from the small world of the embedded default", at_least=0, at_most=1)
    version: int = flag(6, "6 or 7: an RWKV-6 or an RWKV-7", (6, 7))
    vocab: str = flag("640", "the World vocabulary ('world'), or the size of one made of the texts (byte-level BPE)")
    n_layer: int = flag(4, "layers", at_least=1)
    n_embd: int = flag(256, "channels, a multiple of 64", at_least=64)
    steps: int = flag(5000, "optimizer steps", at_least=1)
    positions: int = flag(4000, "positions of a step", at_least=64)
    lr: float = flag(2e-3, "learning rate", above=0)
    save_steps: int = flag(200, "steps between two points to resume from", at_least=1)
    device: str = flag("cpu", "cpu, or cuda")
    bf16: int = flag(1, "1: compute the matrices in bfloat16", (0, 1))
    compile: int = flag(0, "1: fuse the elementwise parts with torch.compile, 1.3 times as fast on a CPU", (0, 1))
    threads: int = flag(0, "threads on a CPU; 0: as many as torch takes", at_least=0)

    def check(self) -> None:
        """Raises UserError for sizes that no model has, and where there is nothing to learn."""
        super().check()
        if self.n_embd % _HEAD_SIZE:
            raise UserError(f"--n_embd: found {self.n_embd}, expected a multiple of {_HEAD_SIZE}, the size of a head")
        if not self.texts and not self.world:
            raise UserError("--texts: found nothing and --world 0, expected a folder of .txt files or a share above 0")
        if self.vocab != WORLD_VOCABULARY and not (self.vocab.isdecimal() and 400 <= int(self.vocab) <= 65_000):
            raise UserError(f"--vocab: found {self.vocab!r}, expected 'world' or a size from 400 to 65000")


class Pretraining:
    """A run: model, optimizer and what they have learned from; the same steps whether it is resumed or not."""

    def __init__(self, config: Flags) -> None:
        self.config, self.out = config, Path(config.out)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        lessons = _lessons(config)
        vocabulary = None if config.vocab == WORLD_VOCABULARY else self.out / _VOCABULARY
        if vocabulary is not None and not vocabulary.exists():
            write_vocabulary(vocabulary, lessons.texts(), int(config.vocab))
        self.tokenizer = WorldTokenizer(vocabulary)
        ids = [self.tokenizer.encode(phone) for phone in PHONES]
        self.phone_ids = torch.tensor([found[0] for found in ids], device=config.device)
        self.model = _new_model(config, self.tokenizer.vocab_size).to(config.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        batches = lessons, self.tokenizer, config.positions, max(1, round(0.15 * config.steps)), config.seed
        self.batches, self.held_out = LessonBatches(*batches), LessonBatches(*batches, held_out=True)
        self.step, self.saved, self.seconds, self.recent = 0, 0, 0.0, list[tuple[float, float]]()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, its number of targets, and how many of these are guessed right."""
        device = self.config.device
        spliced = batch.spliced.to(torch.device(device))
        with autocast(device, bool(self.config.bf16)):
            audio = batch.blends.to(device) @ self.model.embed(self.phone_ids).float()
            if len(audio):
                audio = audio + batch.noise * audio.detach().std() * torch.randn_like(audio)
            x = splice.fill(spliced, audio, self.model.embed(spliced.token_ids))
            sequences = len(spliced.cu_seqlens) - 1
            hidden, _ = self.model.hidden(x, self.model.zero_state(sequences), Packing.of(spliced.cu_seqlens))
            at = spliced.labels != splice.IGNORE
            logits, targets = self.model.head(hidden[0, at]).float(), spliced.labels[at]
        return token_loss_sum(logits, targets), torch.tensor(len(targets)), (logits.argmax(-1) == targets).sum()

    def learn(self, batch: Batch) -> None:
        """One optimizer step."""
        started, config = time.monotonic(), self.config
        torch.manual_seed(config.seed * 1_000_003 + self.step)  # of the noise: the same in a resumed run
        share = min((self.step + 1) / 100, 0.5 * (1 + math.cos(math.pi * self.step / config.steps)) + 1e-3)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * share
        loss, count, right = self.loss(batch)
        self.optimizer.zero_grad()
        (loss / count).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.recent = [*self.recent[-49:], (float(loss.detach() / count), float(right / count))]
        self.seconds += time.monotonic() - started

    def save(self) -> None:
        """Write the model in bfloat16, and what the run is resumed from."""
        weights = {
            name: x.detach().to("cpu", torch.bfloat16).contiguous() for name, x in self.model.state_dict().items()
        }
        write_atomically(self.out / f"rwkv{self.config.version}.safetensors", lambda path: save_file(weights, path))
        point = {
            "config": asdict(self.config), "step": self.step, "seconds": self.seconds, "recent": self.recent,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        write_atomically(self.out / _RESUME, lambda path: torch.save(point, path))
        self.saved = self.step

    def resume(self) -> None:
        """Take the run up where it stopped, if it did; raises UserError where its settings were others."""
        if not (self.out / _RESUME).exists():
            return
        point = torch.load(self.out / _RESUME, map_location=self.config.device, weights_only=True)
        now = asdict(self.config)
        for name, value in point["config"].items():
            if name not in _FREE and now[name] != value:
                raise UserError(
                    f"--{name}: found {now[name]!r}, but {self.out} holds a run with {value!r}; give the same, or "
                    "another --out"
                )
        self.model.load_state_dict(point["model"])
        self.optimizer.load_state_dict(point["optimizer"])
        self.step, self.seconds, self.recent = point["step"], point["seconds"], point["recent"]
        self.saved = self.step

    @torch.no_grad()
    def score(self, batches: int = 20) -> dict[str, float]:
        """Of held-out lessons: the share of target tokens right, and the perplexity of a token."""
        torch.manual_seed(self.config.seed)
        found = [torch.stack(self.loss(self.held_out[number])) for number in range(batches)]
        loss, count, right = torch.stack(found).sum(0).tolist()
        return {"held_out_right": right / count, "held_out_perplexity": math.exp(loss / count)}


def _new_model(config: Flags, vocab: int) -> RWKV:
    """A model with initial values; both versions have 13 C^2 numbers in a layer's large matrices."""
    C, fuse = config.n_embd, bool(config.compile)
    given = vocab, config.n_layer, C, C // _HEAD_SIZE
    if config.version == 6:
        model = RWKV6(RWKV6Sizes(*given, C * 7 // 2, 32, 64), fuse=fuse)
        rwkv6_init.initialise(model)
        return model
    newer = RWKV7(RWKV7Sizes(*given, C * 9 // 2, *rwkv7_init.ranks(C)), fuse=fuse)
    rwkv7_init.initialise(newer)
    return newer


def _lessons(config: Flags) -> Lessons:
    sources = list[tuple[Lessons, float]]()
    if config.texts and config.world < 1:
        sources.append((TextLessons(read_texts(config.texts)), 1 - config.world))
    if config.world:
        sources.append((WorldLessons(), config.world))
    return MixedLessons(sources)


def pretrain(config: Flags) -> dict[str, Any]:
    """Trains, or resumes; writes the model (rwkv6.safetensors or rwkv7.safetensors, bf16), vocab.txt and CARD.md.

    Returns what the card states.
    Raises UserError if the process that makes the lessons dies: nothing that was saved is lost by it.
    """
    run = Pretraining(config)
    run.resume()
    if run.step:
        print(f"resuming behind step {run.step}", flush=True)
    try:
        for batch in run.batches.loader(run.step, config.steps):
            run.learn(batch)
            if run.step % 50 == 0 or run.step == config.steps:
                loss, right = (sum(column) / len(run.recent) for column in zip(*run.recent, strict=True))
                print(
                    f"step {run.step}/{config.steps} loss {loss:.3f} right {right:.3f} {run.seconds:.0f} s", flush=True
                )
            if run.step % config.save_steps == 0 or run.step == config.steps:
                run.save()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"{config.out}: the process that makes the lessons died at step {run.step}; the same command resumes "
            f"behind step {run.saved}"
        ) from error
    facts = {
        "parameters": sum(x.numel() for x in run.model.parameters()),
        "vocabulary": run.tokenizer.vocab_size,
        "steps": run.step,
        "minutes": round(run.seconds / 60, 1),
        **run.score(),
    }
    write_text_atomically(run.out / _CARD, _card(config, facts))
    return facts


def _card(config: Flags, facts: dict[str, Any]) -> str:
    rows = "".join(f"| {name.replace('_', ' ')} | {value} |\n" for name, value in facts.items())
    flags = json.dumps(asdict(config), ensure_ascii=False)
    return f"""# A small RWKV-{config.version}

Pretrained by `python -m rwkv_speech.synthetic.pretrain_lm` on text, on its translations, and on noisy phone transcripts
of it, which teach it to read what an adapter hears. The perplexity is that of a token of held-out lines.

| | |
|---|---|
{rows}
Flags: `{flags}`
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of demo/pretrain-small.sh and of the language model's half of demo/pretrain-tiny.sh."""
    return exit_code(lambda: print(pretrain(parse(Flags, argv, __doc__ or ""))))


if __name__ == "__main__":
    sys.exit(main())
