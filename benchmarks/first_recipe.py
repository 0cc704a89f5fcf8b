"""Our recipe against that of the idea's first implementation: `python -m benchmarks.first_recipe --train_data FILE`.

The same frozen parts, data, order of batches, steps, schedule and initial values; both are decoded greedily. "first":
one learning rate of 1e-4 for adapter and state; the encoder in training mode, with the dropout, layer drop and masking
that its configuration says (Whisper's says none); the loss divided by the positions of audio and text. "ours": two
learning rates, the encoder as it is, the loss divided by the tokens that are learned.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, cpu_name, write_result
from rwkv_speech.audio import length_mask
from rwkv_speech.batch import Batch
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.sources import open_sources
from rwkv_speech.decoding.transcribe import transcribe_batches
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.metrics import score_rows
from rwkv_speech.tasks import DEFAULT
from rwkv_speech.training.optim import lr_factor, make_optimizer

FIRST_RATE, WEIGHT_DECAY, GRAD_CLIP = 1e-4, 0.01, 1.0

Encode = Callable[[Batch], tuple[Tensor, Tensor]]


def in_training_mode(encoder: SpeechEncoder) -> Encode:
    """The first implementation's frames: transformers' own model, left in training mode."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(encoder.name, dtype=torch.float32).train()

    def encode(batch: Batch) -> tuple[Tensor, Tensor]:
        mask = length_mask(batch.num_samples, batch.waveforms.shape[1])
        with torch.no_grad():
            frames = model(batch.waveforms, attention_mask=mask.long()).last_hidden_state
        return frames, encoder.frame_lengths(batch.num_samples)

    return encode


def kept(encoder: SpeechEncoder) -> Encode:
    """Our frames, those of an utterance made once."""
    known: dict[int, Tensor] = {}

    def encode(batch: Batch) -> tuple[Tensor, Tensor]:
        if not all(index in known for index in batch.indices):
            frames, lengths = encoder(batch.waveforms, batch.num_samples, batch.normalised)
            known.update({index: frames[i, : lengths[i]] for i, index in enumerate(batch.indices)})
        found = [known[index] for index in batch.indices]
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True), torch.tensor([len(x) for x in found])

    return encode


class Side:
    """One recipe, its model new and the same as the other's."""

    def __init__(self, parts: Parts, tasks: Sequence[str], rates: tuple[float, float], seed: int, first: bool) -> None:
        torch.manual_seed(seed)
        self.model = SpeechLM.build(parts, task_names=tasks)
        encoder, self._is_first = self.model.encoder, first
        drops = encoder.model.config.model_type != "whisper"  # type: ignore[union-attr] # transformers types it loosely
        self._encode = in_training_mode(encoder) if first and drops else kept(encoder)
        states = self.model.initial_states.values()
        self._optimizer = make_optimizer(self.model.adapter.parameters(), states, *rates, WEIGHT_DECAY)

    def schedule(self, warmup: int, total: int) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rates' course, the same for both."""
        return torch.optim.lr_scheduler.LambdaLR(self._optimizer, lr_factor("cosine", warmup, total))

    def step(self, batch: Batch) -> float:
        """One step; the loss of a token."""
        frames, lengths = self._encode(batch)
        loss = self.model(replace(batch, frames=frames, frame_lengths=lengths))
        positions = int((lengths // self.model.adapter.stack).sum()) + 2 * len(batch) + len(batch.text_ids)
        (loss / (positions if self._is_first else batch.num_targets)).backward()
        torch.nn.utils.clip_grad_norm_(list(self.model.trained_parameters()), GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()) / batch.num_targets


def datasets(args: argparse.Namespace, model: SpeechLM) -> list[SpeechDataset]:
    """To train on, and to score."""
    return [
        SpeechDataset(open_sources(spec), model.tokenizer, args.label_mode, normalise=model.encoder.do_normalize)
        for spec in (args.train_data, args.valid_data)
    ]


def learned(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Train a side and score it."""
    train, valid = datasets(args, side.model)
    loader = train.loader(Cut(args.micro_bsz, seed=args.seed))
    total, started, losses = args.epoch_count * len(loader), time.perf_counter(), list[float]()
    schedule = side.schedule(min(args.warmup_steps, total // 2), total)
    for epoch in range(args.epoch_count):
        loader.set_state(epoch, 0)
        for (batch,) in loader:
            losses.append(side.step(batch))
            schedule.step()
        print(f"  epoch {epoch + 1}: loss {sum(losses[-len(loader) :]) / len(loader):.3f}", flush=True)
    seconds = time.perf_counter() - started
    side.model.eval()
    batches = (batch for (batch,) in valid.loader(Cut(args.micro_bsz, shuffle=False)))
    scores = score_rows(list(transcribe_batches(side.model, batches)))
    return {"steps": total, "loss": losses[-1], "seconds": seconds, "wer": scores.wer, "cer": scores.cer}


def main(argv: Sequence[str] | None = None) -> None:
    """Train both, print errors and their ratio, and keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_model", default="tiny")
    parser.add_argument("--encoder", default="")
    parser.add_argument("--vocab_file", default="")
    parser.add_argument("--stack", type=int)
    parser.add_argument("--adapter_hidden", type=int)
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--valid_data", required=True)
    parser.add_argument("--label_mode", default="none")
    parser.add_argument("--task", default=DEFAULT, help="the state that all lines share")
    parser.add_argument("--epoch_count", type=int, default=16)
    parser.add_argument("--micro_bsz", type=int, default=16)
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--lr_adapter", type=float, default=5e-4)
    parser.add_argument("--lr_state", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    parts = Parts.from_dict(vars(args))
    result = dict[str, dict[str, Any]]()
    for name, rates in (("first", (FIRST_RATE, FIRST_RATE)), ("ours", (args.lr_adapter, args.lr_state))):
        print(name, flush=True)
        result[name] = learned(Side(parts, [args.task], rates, args.seed, name == "first"), args)
        print(f"  WER {100 * result[name]['wer']:.2f} %, CER {100 * result[name]['cer']:.2f} %")
    ratio = {kind: result["ours"][kind] / max(result["first"][kind], 1e-9) for kind in ("wer", "cer")}
    print(f"ours of first: WER {ratio['wer']:.2f}, CER {ratio['cer']:.2f}")
    command = ["python", "-m", "benchmarks.first_recipe", *(argv or sys.argv[1:])]
    threads = torch.get_num_threads()
    print(write_result("first-recipe", args.output, command, cpu_name(), threads=threads, ratio=ratio, **result))


if __name__ == "__main__":
    main()
