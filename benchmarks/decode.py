"""Decoding against pip's `rwkv` (BlinkDL) and the memory floor: `python -m benchmarks.decode`.

On a CPU: a random model of the 1.6B's shape in bfloat16, whose file both sides read; prefill of 195 tokens, then tokens
one by one, in bfloat16 and in 8 bits. The sides take turns, and their logits must agree. Goals: prefill 1.2 times, bf16
decoding 2 times, int8 3 times as fast. No decoder that reads its weights for each token is faster than the memory
floor: the weights' bytes over the rate at which this machine reads memory, measured in the same run.
With `--device cuda`: the 3B's shape, the step in a CUDA graph at batch 1 and 64, and utterances of 7.4 s from the
waveform to the text with a random WavLM of Large's shape.
"""

# B slots · V vocabulary

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, cpu_name, gpu_seconds, interleaved, relative_rms, write_result
from benchmarks.peers import pip_rwkv_model
from benchmarks.train_step import random_encoder, random_lm
from benchmarks.wkv6 import copy_rate
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Sample
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.models.base import RWKV6Sizes
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.planning.measure import BASE_MODELS
from rwkv_speech.tokenizer import WorldTokenizer

PREFILL = 195  # a 16 s utterance at 10 audio tokens a second, and its prompt
TOKENS = 4  # steps of one measurement
BATCH = 4
# Of the logits against pip's, whose activations are rounded to bfloat16 in all 24 layers of random weights.
MOST_ERROR = {"bf16": 0.1, "int8": 0.2}
GOALS = {"prefill bf16": 1.2, "decode bf16": 2.0, "decode int8": 3.0}
UTTERANCE_SECONDS, UTTERANCE_TOKENS = 7.4, 27
Row = dict[str, Any]


@contextmanager
def random_file(sizes: RWKV6Sizes) -> Iterator[Path]:
    """A base model's file with random weights in bfloat16, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.save(random_lm(sizes, torch.bfloat16, "cpu", fuse=False).state_dict(), Path(folder) / "base.pth")
        yield Path(folder) / "base.pth"


def read_rate(rounds: int) -> float:
    """Bytes per second that PyTorch's threads read from memory, the faster of a sum and of a matrix-vector product."""
    matrix, vector = torch.ones(1 << 14, 1 << 14), torch.ones(1 << 14)
    times = interleaved({"sum": matrix.sum, "product": lambda: torch.mv(matrix, vector)}, rounds)
    return matrix.nbytes / min(times.values())


def weight_bytes(model: RWKV) -> int:
    """What a step must read: all weights but the embeddings, of which it takes a row."""
    return sum(x.nbytes for name, x in model.state_dict().items() if not name.startswith("emb."))


class Ours:
    """Our model, called as pip's is."""

    def __init__(self, path: Path, quant: str) -> None:
        self.model = RWKV6.from_pretrained(path, torch.bfloat16, quant=quant)
        self.states = {batch: self.model.zero_state(batch) for batch in (1, BATCH)}

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> Tensor:
        """The logits (V,) after these tokens, and the state kept."""
        hidden, self.states[1] = self.model.hidden(self.model.embed(torch.tensor([ids])), self.model.zero_state(1))
        return self.model.head(hidden[0, -1])

    def decode(self, batch: int = 1) -> Tensor:
        """The logits (B, V) after a few tokens in each of so many slots."""
        for number in range(1, TOKENS + 1):
            logits = self.model.step(torch.full((batch,), number), self.states[batch])
        return logits


class Theirs:
    """pip's model, with one state."""

    def __init__(self, path: Path) -> None:
        self.model = pip_rwkv_model(path, "cpu bf16")
        self.state: Any = None

    def prefill(self, ids: list[int]) -> Tensor:
        """As Ours.prefill."""
        logits, self.state = self.model.forward(ids, None)
        return logits

    def decode(self) -> Tensor:
        """As Ours.decode with one slot: it has no batches."""
        for number in range(1, TOKENS + 1):
            logits, self.state = self.model.forward([number], self.state)
        return logits[None]


def compare_cpu(path: Path, quant: str, theirs: Theirs, rounds: int, rate: float) -> list[Row]:
    """Our model, its matrices in bfloat16 or as `quant` says, against pip's, measured turn about.

    Raises ValueError where they do not agree.
    """
    ours, name = Ours(path, quant), quant or "bf16"
    ids = torch.randint(1, ours.model.sizes.vocab, (PREFILL,), generator=torch.Generator().manual_seed(1)).tolist()
    errors = [relative_rms(ours.prefill(ids), theirs.prefill(ids)), relative_rms(ours.decode(), theirs.decode())]
    if max(errors) > MOST_ERROR[name]:
        raise ValueError(f"{name}: logits differ from pip rwkv's by {errors}")
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: ours.prefill(ids),
        "their prefill": lambda: theirs.prefill(ids),
        "decode": ours.decode,
        "their decode": theirs.decode,
        "batch": lambda: ours.decode(BATCH),
    }
    times = interleaved(calls, rounds)
    floor = weight_bytes(ours.model) / rate
    rows = [{"what": f"prefill {name}", "tokens_per_second": PREFILL / times["prefill"],
             "times_peer": times["their prefill"] / times["prefill"]}]  # fmt: skip
    for what, key, batch in ((f"decode {name}", "decode", 1), (f"decode {name}, batch {BATCH}", "batch", BATCH)):
        step = times[key] / TOKENS
        rows.append({"what": what, "tokens_per_second": batch / step, "floor_share": floor / step,
                     "times_peer": batch * times["their decode"] / times[key]})  # fmt: skip
    rows[0]["error"] = max(errors)
    rows.append({"what": "pip rwkv bf16", "tokens_per_second": TOKENS / times["their decode"],
                 "prefill_tokens_per_second": PREFILL / times["their prefill"]})  # fmt: skip
    return rows


def measure_cpu(rounds: int, sizes: RWKV6Sizes) -> Row:
    """Both types against pip's `rwkv`, and what the machine reads from memory before and after."""
    load, rates = [os.getloadavg()[0]], [read_rate(rounds)]
    with random_file(sizes) as path:
        theirs = Theirs(path)
        rows = [row for quant in ("", "int8") for row in compare_cpu(path, quant, theirs, rounds, rates[0])]
    load.append(os.getloadavg()[0])
    rates.append(read_rate(rounds))
    for row in rows:
        numbers = "".join(f"  {key} {value:.2f}" for key, value in row.items() if key != "what")
        goal = f"  (goal {GOALS[row['what']]})" if row["what"] in GOALS else ""
        print(f"{row['what']:24}{numbers}{goal}")
    print(f"memory read at {rates[0] / 1e9:.1f} GB/s before, {rates[1] / 1e9:.1f} after")
    print(f"load {load[0]:.1f} before, {load[1]:.1f} after")
    return {"rows": rows, "bytes_per_second": rates, "load": load, "threads": torch.get_num_threads()}


def measure_steps(lm: RWKV, rounds: int, rate: float) -> list[Row]:
    """A step of all slots in a CUDA graph, with the choice of the next token, which it feeds to itself."""
    rows = []
    for batch in (1, 64):
        state, ids = lm.zero_state(batch), torch.ones(batch, dtype=torch.long, device="cuda")
        step = gpu_seconds(functools.partial(_greedy, lm, ids, state), rounds, calls=4)
        # The states are read and written.
        floor = (weight_bytes(lm) + 2 * state.wkv.nbytes) / rate
        rows.append({"what": f"decode, batch {batch}", "tokens_per_second": batch / step, "floor_share": floor / step})
    return rows


def _greedy(lm: RWKV, ids: Tensor, state: Any) -> None:
    ids.copy_(lm.step(ids, state).argmax(-1))


def real_time(model: SpeechLM, slots: int, utterances: int) -> float:
    """Seconds of audio decoded a second, from waveforms, each to as many tokens as fast speech has."""
    torch.manual_seed(0)
    waveform = 0.1 * torch.randn(int(UTTERANCE_SECONDS * SAMPLE_RATE))
    samples = [Sample(str(i), waveform.roll(i), "", [], UTTERANCE_SECONDS, i, "asr") for i in range(utterances)]
    start = time.perf_counter()
    done = list(Engine(model, slots=slots).run(Request(s.index, s, UTTERANCE_TOKENS) for s in samples))
    assert len(done) == utterances  # each came with a copy to the host, so that none is still being computed
    return utterances * UTTERANCE_SECONDS / (time.perf_counter() - start)


def random_model(encoder: Any, sizes: RWKV6Sizes, dtype: torch.dtype, device: str) -> SpeechLM:
    """All parts random, as they are put together for decoding."""
    parts = Parts("random", "random", "", 5, 2048, "#", sizes.n_layer, sizes.C)
    lm = random_lm(sizes, dtype, device, fuse=False)
    return SpeechLM(SpeechEncoder(encoder, "random", dtype=dtype), lm, WorldTokenizer(), parts).to(device).eval()


def measure_gpu(rounds: int) -> Row:
    """Steps against the rate of a copy, and whole utterances."""
    rate = copy_rate()
    model = random_model(random_encoder(24, 1024, 16, 512), BASE_MODELS["3B"], torch.bfloat16, "cuda")
    rows = measure_steps(model.lm, rounds, rate)
    real_time(model, 64, 64)
    rows.append({"what": f"utterances of {UTTERANCE_SECONDS} s", "times_real_time": real_time(model, 64, 512)})
    for row in rows:
        print("  ".join(f"{key} {value if isinstance(value, str) else round(value, 2)}" for key, value in row.items()))
    return {"rows": rows, "bytes_per_second": rate, "cuda": torch.version.cuda}


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it, with its circumstances, into `benchmarks/results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each row (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    flags = parser.parse_args(argv)
    on_gpu = flags.device == "cuda"
    content = measure_gpu(flags.rounds) if on_gpu else measure_cpu(flags.rounds, BASE_MODELS["1.6B"])
    command = ["python", "-m", "benchmarks.decode", f"--device={flags.device}", f"--rounds={flags.rounds}"]
    device = torch.cuda.get_device_name() if on_gpu else cpu_name()
    print(write_result(f"decode-{flags.device}", flags.output, command, device, **content))


if __name__ == "__main__":
    main()
