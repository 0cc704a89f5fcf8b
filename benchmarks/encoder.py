"""The frozen encoder against transformers' own WavLM: `python -m benchmarks.encoder`.

A random model of WavLM-Large's shape, its gates and biases large, hears 8 utterances of 2 to 6 s. "attention": that of
the first layer, which makes the bias, and of the second; "encoder": waveforms to frames. Both run in turn, so that
whatever else the machine does meets both alike; medians of the times and of the ratios. Peaks are what one pass adds:
of the CUDA allocator, or of the resident memory of a process of its own. Errors are relative RMS over the true frames,
against transformers in float32.
"""

import argparse
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import WavLMConfig, WavLMModel

from benchmarks.common import RESULTS, cpu_name, seconds, write_result
from rwkv_speech.audio import SAMPLE_RATE, Framing, length_mask
from rwkv_speech.models.encoder import SpeechEncoder, normalise

SIDES = ("transformers", "ours")
PARTS = ("attention", "encoder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A batch: so many utterances, of lengths evenly between these samples.
B, SHORTEST, LONGEST = 8, 2 * SAMPLE_RATE, 6 * SAMPLE_RATE


def large_shaped(layers: int) -> Any:
    """WavLM-Large of so many layers."""
    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    torch.manual_seed(0)
    model = WavLMModel(config).requires_grad_(False).eval()
    for name, x in model.encoder.named_parameters():
        if "gru_rel_pos_const" in name or "rel_attn" in name:
            x.copy_(torch.randn_like(x))
    return model


def forward(side: str, part: str, dtype: torch.dtype, layers: int, device: str) -> Callable[[], Tensor]:
    """One pass of a side over a model of its own, as a call that returns the true frames."""
    theirs = large_shaped(layers).to(device)
    num_samples = torch.linspace(SHORTEST, LONGEST, B, device=device).long()
    config: Any = theirs.config
    lengths = Framing.of_convolutions(config.conv_kernel, config.conv_stride).count(num_samples)
    mask = length_mask(lengths, int(lengths.max()))
    torch.manual_seed(1)
    waveforms = normalise(0.1 * torch.randn(B, LONGEST).to(device), num_samples)
    hidden = torch.randn(B, mask.shape[1], theirs.config.hidden_size).to(device, dtype)
    if side == "ours":
        ours = SpeechEncoder(theirs, "random", dtype=dtype)
    else:
        theirs = theirs.to(dtype)

    def attention() -> Tensor:
        bias = None
        for layer in theirs.encoder.layers[:2]:
            frames, _, bias = layer.attention(hidden, attention_mask=mask, position_bias=bias)
        return frames[mask].float()

    def encoder() -> Tensor:
        if side == "ours":
            return ours(waveforms, num_samples, normalised=True)[0][mask]
        samples = length_mask(num_samples, LONGEST).long()
        return theirs(waveforms.to(dtype), attention_mask=samples).last_hidden_state[mask].float()

    return torch.no_grad()(attention if part == "attention" else encoder)


def timed(run: Callable[[], Tensor], device: str) -> float:
    """Seconds of one pass."""

    def call() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return seconds(call, 1)


def peak_bytes(side: str, part: str, dtype: str, layers: int, device: str, threads: int) -> int:
    """What one pass adds to the memory in use, at its height."""
    if device == "cuda":
        run = forward(side, part, DTYPES[dtype], layers, device)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # A process of its own: what an allocator keeps from one pass would hide in the next.
    command = [sys.executable, "-m", "benchmarks.encoder", "--layers", str(layers), "--threads", str(threads)]
    return int(subprocess.check_output([*command, "--peak", side, part, dtype], text=True).split()[-1])


def resident_peak(side: str, part: str, dtype: str, layers: int) -> int:
    """The same in this process."""
    run = forward(side, part, DTYPES[dtype], layers, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(part: str, dtype: str, layers: int, device: str, rounds: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    exact = forward("transformers", part, torch.float32, layers, device)()
    runs = {side: forward(side, part, DTYPES[dtype], layers, device) for side in SIDES}
    # The first pass warms up.
    errors = {side: float((run() - exact).norm() / exact.norm()) for side, run in runs.items()}
    pairs = [[timed(run, device) for run in runs.values()] for _ in range(rounds)]
    times = dict(zip(SIDES, map(statistics.median, zip(*pairs, strict=True)), strict=True))
    del exact, runs
    peaks = {side: peak_bytes(side, part, dtype, layers, device, threads) for side in SIDES}
    return {
        "part": part,
        "dtype": dtype,
        "ms": {side: round(times[side] * 1e3, 1) for side in SIDES},
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        "peak_mb": {side: round(peaks[side] / 1e6, 1) for side in SIDES},
        "relative_rms_error": errors,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table in print."""
    (ms, our_ms), (mb, our_mb), (error, our_error) = (
        row[key].values() for key in ("ms", "peak_mb", "relative_rms_error")
    )
    return (
        f"{row['part']:9} {row['dtype']:8} {ms:8.1f} {our_ms:8.1f} {row['ratio']:6.2f}x {mb:9.1f} {our_mb:8.1f} "
        f"{error:9.1e} {our_error:8.1e}"
    )


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it, with its circumstances, into `benchmarks/results/`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each row (default: %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=24 if device == "cuda" else 2, help="of the model (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    parser.add_argument("--peak", nargs=3, metavar=("SIDE", "PART", "DTYPE"), help="print one peak in bytes, no more")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    # transformers' attention has a float bias beside a boolean mask.
    warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
    if flags.peak:
        side, part, dtype = flags.peak
        print(resident_peak(side, part, dtype, flags.layers))
        return
    print("                         time, ms                     peak, MB            error")
    print("part      dtype      theirs     ours   ratio    theirs     ours    theirs     ours")
    rows = []
    for part in PARTS:
        for dtype in DTYPES:
            rows.append(measure(part, dtype, flags.layers, device, flags.rounds, flags.threads))
            print(line(rows[-1]))
    flags_given = [f"--{name}={getattr(flags, name)}" for name in ("threads", "rounds", "layers")]
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    command = ["python", "-m", "benchmarks.encoder", *flags_given]
    print(write_result(f"encoder-{device}", flags.output, command, name, threads=flags.threads, rows=rows))


if __name__ == "__main__":
    main()
