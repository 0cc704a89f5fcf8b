"""One training step of SpeechLM against the plain way to write it: `python -m benchmarks.train_step`.

The plain way: a padded batch, logits and cross-entropy at all positions, transformers' own WavLM attention, WKV-6 in
PyTorch's operations. It runs on the same weights, and its loss and gradients must be ours. A step is the forward pass,
the loss and the gradients of adapter and initial state; frozen weights have none on either side. On a CPU: 8
utterances of 2.5 to 6 s for a random model of the 0.1B's shape; its encoder is cut to 4 narrow layers, so that it takes
about the share of the operations that WavLM-Large takes beside the 3B model. Goals there: twice as fast, 0.6 of the
memory. With `--device cuda`: the shapes of 3B, 7B and WavLM-Large under bfloat16, 16 utterances of 15 s.
Memory is what a step adds to the weights at its height, each side in a process of its own on a CPU.
"""

# U utterances · S samples · A audio tokens · T positions · C channels · D encoder width · V vocabulary

import argparse
import copy
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WavLMConfig, WavLMModel

from benchmarks.common import RESULTS, cpu_name, interleaved, relative_rms, write_result
from benchmarks.encoder import resident
from rwkv_speech.audio import SAMPLE_RATE, length_mask
from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder, normalise
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.splice import IGNORE
from rwkv_speech.planning.cost import OPERATIONS
from rwkv_speech.planning.measure import BASE_MODELS, MicroBatch, Sizes, encoding, learning
from rwkv_speech.tokenizer import WorldTokenizer

SIDES = ("plain", "ours")
GOALS = {"speed": 2.0, "memory": 0.6}
STACK = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model and a batch; lengths of utterances and texts lie evenly between their bounds, in different order."""

    lm: RWKV6Sizes
    encoder: tuple[int, int, int, int]  # layers, width, heads, width of the convolutions
    utterances: int
    seconds: tuple[float, float]
    text_tokens: tuple[int, int]
    bf16: bool
    fuse: bool = False

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Samples and text tokens of each utterance, (U,) each."""
        generator = torch.Generator().manual_seed(1)
        samples = torch.linspace(*self.seconds, self.utterances).mul(SAMPLE_RATE).long()
        text = torch.linspace(*self.text_tokens, self.utterances).round().long()
        samples = samples[torch.randperm(len(samples), generator=generator)]
        return samples, text[torch.randperm(len(text), generator=generator)]

    def operations(self, encoder: str) -> dict[str, float]:
        """What the true lengths need, without padding, of `encoder`, a configuration in JSON, and language model."""
        sizes, dtype = Sizes(self.lm, encoder, STACK), torch.bfloat16 if self.bf16 else torch.float32
        batches = [
            MicroBatch(1, samples / SAMPLE_RATE, text)
            for samples, text in zip(*(x.tolist() for x in self.lengths()), strict=True)
        ]
        return {
            "encoder": sum(encoding(encoder, batch, dtype).operations for batch in batches),
            "lm": sum(learning(sizes, batch, dtype, False).operations for batch in batches),
        }


_LARGE = (24, 1024, 16, 512)
CASES = {
    "0.1B": Case(RWKV6Sizes(65536, 12, 768, 12, 2688, 32, 64), (4, 384, 6, 128), 8, (2.5, 6.0), (8, 25), False),
    "3B": Case(BASE_MODELS["3B"], _LARGE, 16, (15.0, 15.0), (50, 50), True),
    "7B": Case(BASE_MODELS["7B"], _LARGE, 16, (15.0, 15.0), (50, 50), True),
}


def random_encoder(layers: int, width: int, heads: int, conv_width: int) -> Any:
    """A WavLM that is normed layer by layer, as Large is: WavLM-base's group norm would depend on the padding."""
    config = WavLMConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        conv_dim=(conv_width,) * 7, feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    return WavLMModel(config).requires_grad_(False).eval()


def random_lm(sizes: RWKV6Sizes, dtype: torch.dtype, device: str, fuse: bool) -> RWKV6:
    """Every tensor matters, decays from slow to fast; made in place, so that no copy raises the peak."""
    with torch.device("meta"):
        model = RWKV6(sizes, fuse=fuse).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if name.endswith("time_decay"):
            p.uniform_(-6, 1)
        elif "_w1" in name or "_w2" in name:
            p.normal_(0, 0.3 * p.shape[-2] ** -0.5)
        elif "time_maa" in name:
            p.uniform_(0, 1)
        elif p.ndim == 1:  # the norms
            p.normal_(1 if name.endswith("weight") else 0, 0.1)
        else:  # the embedding too; the bonus is small beside it
            p.normal_(0, 0.5 if "emb" in name or "faaaa" in name else p.shape[-1] ** -0.5)
    return model


def with_pytorch_kernel(lm: RWKV6, fuse: bool) -> RWKV6:
    """The same weights, WKV-6 in PyTorch's operations."""
    with torch.device("meta"):
        model = RWKV6(lm.sizes, "torch", fuse)
    model.load_state_dict(dict(lm.named_parameters()), assign=True)
    return model.requires_grad_(False).eval()


class Bench:
    """Both sides' steps of one case, on one set of weights."""

    def __init__(self, case: Case, device: str, grad_cp: bool = False) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        theirs = random_encoder(*case.encoder).to(device)
        self.encoder_sizes = theirs.config.to_json_string()
        # Our encoder changes its modules in place, under bfloat16 its tensors, too; the plain side casts as it goes.
        shared = {} if case.bf16 else {id(p): p for p in theirs.parameters()}
        self.plain_encoder: Any = copy.deepcopy(theirs, shared)
        lm = random_lm(case.lm, torch.bfloat16 if case.bf16 else torch.float32, device, case.fuse)
        self.plain_lm = with_pytorch_kernel(lm, case.fuse)
        lm.grad_cp = self.plain_lm.grad_cp = grad_cp
        parts = Parts("random", "random", "", STACK, 2048, "#", case.lm.n_layer, case.lm.C)
        encoder = SpeechEncoder(theirs, "random", dtype=torch.bfloat16 if case.bf16 else torch.float32)
        self.model = SpeechLM(encoder, lm, WorldTokenizer(), parts).to(device)
        nn.init.normal_(self.model.initial_states["asr"], 0, 0.1)
        num_samples, text_lengths = case.lengths()
        waveforms = 0.1 * torch.randn(case.utterances, int(num_samples.max()))
        ids = torch.randint(1, case.lm.vocab, (int(text_lengths.sum()),)).split(text_lengths.tolist())
        samples = [
            Sample(str(i), waveform[:length], "", text.tolist(), length / SAMPLE_RATE, i, "asr")
            for i, (waveform, length, text) in enumerate(zip(waveforms, num_samples.tolist(), ids, strict=True))
        ]
        self.batch = collate(samples).to(device)
        self.targets = self.batch.num_targets
        self.marks: list[list[float]] = []
        self.cpu_seconds: dict[str, list[float]] = {side: [] for side in SIDES}

    def now(self) -> float:
        """The clock, once the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, side: str) -> float:
        """Forward, loss, backward; the gradients stay until the next step."""
        self.model.zero_grad()
        cpu = time.process_time()
        # As the trainer runs: bf16-mixed on a GPU, and none of it on a CPU.
        with torch.autocast(self.device, torch.bfloat16, enabled=self.case.bf16):
            loss = (self.plain_loss_sum() if side == "plain" else self.our_loss_sum()) / self.targets
        before = self.now()
        loss.backward()
        after = self.now()
        if side == "ours":
            self.marks[-1] += [before, after]
        self.cpu_seconds[side].append(time.process_time() - cpu)
        return loss.item()

    def our_loss_sum(self) -> Tensor:
        """`SpeechLM.forward`, stopped between its two parts for their times."""
        start = self.now()
        frames, lengths = self.model.encoder(self.batch.waveforms, self.batch.num_samples)
        self.marks.append([start, self.now()])
        loss: Tensor = self.model(replace(self.batch, frames=frames, frame_lengths=lengths))
        return loss

    def plain_loss_sum(self) -> Tensor:
        """The same number the plain way."""
        b, model, lm = self.batch, self.model, self.plain_lm
        waveforms, num_samples, ids, text_lengths = (
            x.to(self.device) for x in (b.waveforms, b.num_samples, b.text_ids, b.text_lengths)
        )
        with torch.no_grad():
            mask = length_mask(num_samples, waveforms.shape[1]).long()
            frames = self.plain_encoder(normalise(waveforms, num_samples), attention_mask=mask).last_hidden_state
        U, longest, _ = frames.shape
        stacked = frames[:, : longest // STACK * STACK].reshape(U, longest // STACK, -1)
        audio = model.adapter[2](model.adapter[1](model.adapter[0](stacked)))
        counts = (self.model.encoder.frame_lengths(num_samples) // STACK).tolist()
        separator, end = ids.new_tensor([model.separator_id]), ids.new_tensor([model.tokenizer.eos_id])
        inputs, labels = [], []
        for row, count, text in zip(audio, counts, ids.split(text_lengths.tolist()), strict=True):
            tokens = lm.embed(torch.cat((separator, text)))
            inputs.append(torch.cat((row[:count].to(tokens.dtype), tokens)))
            labels.append(torch.cat((text.new_full((count,), IGNORE), text, end)))
        x = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        logits = lm(inputs_embeds=x, state=model.initial_state(["asr"] * U)).logits
        return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum")

    def compare(self) -> dict[str, float]:
        """Relative differences of loss and gradients; raises ValueError where they are more than rounding."""
        losses, gradients = {}, {}
        for side in SIDES:
            losses[side] = self.step(side)
            gradients[side] = [p.grad for p in self.model.trained_parameters() if p.grad is not None]
        found = {"loss": losses["plain"], "loss_error": abs(losses["ours"] / losses["plain"] - 1)}
        pairs = zip(gradients["ours"], gradients["plain"], strict=True)
        found["gradient_error"] = max(relative_rms(a, b) for a, b in pairs)
        # bfloat16 rounds to 3 digits, in other places on either side; a wrong gradient would be off by about 1.
        limits = {"loss_error": 1e-2, "gradient_error": 0.3} if self.case.bf16 else dict.fromkeys(
            ("loss_error", "gradient_error"), 1e-4)  # fmt: skip
        if not all(found[name] <= limit for name, limit in limits.items()):
            raise ValueError(f"the two sides do not compute the same: found {found}, expected at most {limits}")
        self.marks.clear()
        return found

    def split(self) -> dict[str, float]:
        """Median seconds of the parts of our steps since the comparison, the first one left out."""
        parts = [[b - a for a, b in itertools.pairwise(marks)] for marks in self.marks[1:]]
        names = ("encoder", "adapter and lm forward", "backward")
        return dict(zip(names, map(statistics.median, zip(*parts, strict=True)), strict=True))


def resident_peak(case: Case, side: str) -> tuple[int, int]:
    """Bytes that the first step adds to this process at its height, and that height."""
    bench = Bench(case, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: building the model is not in it
    before = resident("VmRSS")
    bench.step(side)
    peak = resident("VmHWM")
    return peak - before, peak


def child_peak(name: str, side: str, threads: int) -> list[int]:
    """The same in a process of its own: what an allocator keeps from one side would hide in the other."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--threads", str(threads), "--peak", name, side]
    return [int(x) for x in subprocess.check_output(command, text=True).split()[-2:]]


def gpu_peak(step: Callable[[], Any]) -> list[int]:
    """The same of the CUDA allocator, for one step that is not the first."""
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated()
    return [peak - before, peak]


def measure_cpu(name: str, rounds: int, threads: int) -> Row:
    """Time by turns, memory apart."""
    case = CASES[name]
    peaks = {side: child_peak(name, side, threads) for side in SIDES}
    bench = Bench(case, "cpu")
    same = bench.compare()
    times = interleaved({side: functools.partial(bench.step, side) for side in SIDES}, rounds)
    work = case.operations(bench.encoder_sizes)
    # What the threads computed: of a busy machine it says more than the clock. The first two steps warmed up.
    cpu = {side: statistics.median(bench.cpu_seconds[side][2:]) for side in SIDES}
    row: Row = {
        "model": name,
        "cpu_seconds": cpu,
        "cpu_speed": cpu["plain"] / cpu["ours"],
        "seconds": times,
        "speed": times["plain"] / times["ours"],
        "peak_bytes": {side: peaks[side][0] for side in SIDES},
        "peak_bytes_with_weights": {side: peaks[side][1] for side in SIDES},
        "memory": peaks["ours"][0] / peaks["plain"][0],
        "our_seconds": bench.split(),
        "operations": work,
        **same,
    }
    row["goals_met"] = {"speed": row["speed"] >= GOALS["speed"], "memory": row["memory"] <= GOALS["memory"]}
    print(
        f"loss {same['loss']:.6f} on both sides within {same['loss_error']:.1e}, gradients within "
        f"{same['gradient_error']:.1e}; encoder {100 * work['encoder'] / sum(work.values()):.0f} % of operations"
    )
    print(f"{name:6} {'seconds':>9} {'of CPU':>9} {'peak MB':>9} {'with weights':>13}")
    for side in SIDES:
        print(f"{side:6} {times[side]:9.2f} {cpu[side]:9.2f} {peaks[side][0] / 1e6:9.0f} {peaks[side][1] / 1e6:13.0f}")
    print(
        f"{row['speed']:.2f}x as fast, {row['cpu_speed']:.2f}x by CPU (goal {GOALS['speed']}); "
        f"{row['memory']:.2f} of the memory (goal {GOALS['memory']})"
    )
    print("our step:", ", ".join(f"{part} {taken:.2f} s" for part, taken in row["our_seconds"].items()))
    return row


def measure_gpu(name: str, rounds: int) -> list[Row]:
    """Both sides with and without recomputation; each builds its model anew, so that nothing is left from the other."""
    rows = []
    for grad_cp in (False, True):
        for side in SIDES:
            row: Row = {"model": name, "side": side, "grad_cp": grad_cp}
            try:
                row |= gpu_row(Bench(CASES[name], "cuda", grad_cp), side, rounds)
                print(
                    f"{name:6} {side:6} {grad_cp!s:8} {1e3 * row['seconds']:8.0f} {row['peak_bytes'] / 1e9:8.1f} "
                    f"{row['peak_bytes_with_weights'] / 1e9:12.1f} {row['mfu']:7.1%} {row['lm_mfu'] or math.nan:7.1%}"
                )
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
                print(f"{name:6} {side:6} {grad_cp!s:8} out of memory")
            rows.append(row)
            torch.cuda.empty_cache()
    with_both = Bench(CASES[name], "cuda", grad_cp=True)
    rows[-1] |= with_both.compare()
    print(f"{name:6} loss within {rows[-1]['loss_error']:.1e}, gradients within {rows[-1]['gradient_error']:.1e}")
    return rows


def gpu_row(bench: Bench, side: str, rounds: int) -> Row:
    """Time, memory and utilisation of one side: of the bfloat16 peak; neither padding nor recomputation counts."""
    peak, with_weights = gpu_peak(functools.partial(bench.step, side))
    bench.marks.clear()
    taken = interleaved({side: functools.partial(bench.step, side)}, rounds)[side]
    work = bench.case.operations(bench.encoder_sizes)
    row: Row = {
        "seconds": taken,
        "peak_bytes": peak,
        "peak_bytes_with_weights": with_weights,
        "mfu": sum(work.values()) / taken / OPERATIONS[torch.bfloat16],
        "lm_mfu": None,
    }
    if side == "ours":
        row["our_seconds"] = bench.split()
        row["lm_mfu"] = work["lm"] / (taken - row["our_seconds"]["encoder"]) / OPERATIONS[torch.bfloat16]
    return row


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it, with its circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="fuse elementwise parts, of both sides' language model")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help="print one peak in bytes, no more")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    # transformers' attention has a float bias beside a boolean mask.
    warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
    if flags.compile:
        CASES.update({name: replace(case, fuse=True) for name, case in CASES.items()})
    if flags.peak:
        print(*resident_peak(CASES[flags.peak[0]], flags.peak[1]))
        return
    load = os.getloadavg()[0]
    if flags.device == "cuda":
        print("model  side   grad_cp        ms  peak GB with weights     MFU  LM MFU")
        rows = [row for name in ("3B", "7B") for row in measure_gpu(name, flags.rounds)]
        device = torch.cuda.get_device_name()
    else:
        rows, device = [measure_cpu("0.1B", flags.rounds, flags.threads)], cpu_name()
    loads = [load, os.getloadavg()[0]]
    print(f"{flags.threads} threads; load {loads[0]:.1f} before, {loads[1]:.1f} after")
    command = ["python", "-m", "benchmarks.train_step",
               *(f"--{k}={v}" for k, v in vars(flags).items() if k not in ("output", "peak"))]  # fmt: skip
    cases = {row["model"]: asdict(CASES[row["model"]]) for row in rows}
    print(write_result(f"train_step-{flags.device}", flags.output, command, device, threads=flags.threads,
                       goals=GOALS, cases=cases, rows=rows, load=loads))  # fmt: skip


if __name__ == "__main__":
    main()
