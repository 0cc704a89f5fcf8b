"""Our recipe against that of the idea's first implementation: `python -m benchmarks.first_recipe --train_data FILE`.

The same frozen parts, data, order of batches, steps, schedule and initial values; both are decoded greedily, and with
--ctc_epochs ours once more, by a beam search that listens to a CTC head trained on the same recordings ("joint").
"first": one learning rate of 1e-4 for adapter and state; the encoder in training mode, with the dropout, layer drop and
masking that its configuration says (Whisper's says none); the loss divided by the positions of audio and text. "ours":
two learning rates, the encoder as it is, the loss divided by the tokens that are learned.
"""

import argparse
import sys
import tempfile
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
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.epoch import Cut
from rwkv_speech.data.sources import open_sources
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.transcribe import transcribe_batches
from rwkv_speech.models.checkpoint import LAST, load_trained
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.metrics import score_rows
from rwkv_speech.tasks import DEFAULT
from rwkv_speech.training.ctc import fit_ctc
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
    return {"steps": total, "loss": losses[-1], "seconds": seconds, **errors(side.model, valid, args.micro_bsz)}


def errors(model: SpeechLM, valid: SpeechDataset, size: int, options: Options = GREEDY) -> dict[str, float]:
    """WER and CER, `size` utterances at a time."""
    batches = (batch for (batch,) in valid.loader(Cut(size, shuffle=False)))
    scores = score_rows(list(transcribe_batches(model, batches, options)))
    return {"wer": scores.wer, "cer": scores.cer}


def joint(side: Side, args: argparse.Namespace) -> dict[str, float]:
    """Give a trained side a CTC head of the same recordings, and score both together."""
    train, valid = datasets(args, side.model)
    with tempfile.TemporaryDirectory() as folder:
        side.model.save(Path(folder) / LAST)
        head = {"ctc": 1, "ctc_epochs": args.ctc_epochs, "ctc_hidden": 320, "ctc_layers": 3}
        cut = {"micro_bsz": args.micro_bsz, "label_mode": args.label_mode, "task": args.task, "seed": args.seed}
        run = {"proj_dir": folder, "train_data": args.train_data, "device": "cpu", "workers": 0}
        fit_ctc(side.model, TrainConfig(**run, **cut, **head), train, None)
        side.model.ctc = load_trained(Path(folder) / LAST).ctc_head()
    return errors(side.model, valid, args.micro_bsz, Options.given(0.0, beam=8, ctc_weight=1.0))


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
    parser.add_argument("--ctc_epochs", type=int, default=0, help="of ours' CTC head; 0: none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    parts = Parts.from_dict(vars(args))
    result = dict[str, dict[str, Any]]()
    for name, rates in (("first", (FIRST_RATE, FIRST_RATE)), ("ours", (args.lr_adapter, args.lr_state))):
        print(name, flush=True)
        side = Side(parts, [args.task], rates, args.seed, name == "first")
        result[name] = learned(side, args)
        if name == "ours" and args.ctc_epochs:
            result["joint"] = joint(side, args)
    first, *others = result
    for name, found in result.items():
        print(f"{name}: WER {100 * found['wer']:.2f} %, CER {100 * found['cer']:.2f} %")
    ratio = {
        name: {kind: result[name][kind] / max(result[first][kind], 1e-9) for kind in ("wer", "cer")} for name in others
    }
    for name, found in ratio.items():
        print(f"{name} of {first}: WER {found['wer']:.2f}, CER {found['cer']:.2f}")
    command = ["python", "-m", "benchmarks.first_recipe", *(argv or sys.argv[1:])]
    threads = torch.get_num_threads()
    print(write_result("first-recipe", args.output, command, cpu_name(), threads=threads, ratio=ratio, **result))


if __name__ == "__main__":
    main()
