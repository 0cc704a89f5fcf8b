"""The tiles kernels' machine code: instructions per warp and tile, registers, shared memory, blocks per multiprocessor.

What can be said of their speed without a GPU. Needs nvcc, and cuobjdump (pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm) to read what it made for compute capability 9.0.
"""

import argparse
import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from rwkv_speech.errors import UserError
from rwkv_speech.ops import build

RECORDED = Path(__file__).with_suffix(".json")
_ARCHITECTURE = "90"
_KERNELS = ("forward", "states", "backward")
_WARPS = 4  # of a block
_TILES_OF_OUTER_LOOP = 4  # what runs once per kept state
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)$")


@dataclass(frozen=True)
class Counts:
    """What one kernel takes."""

    per_tile: int  # instructions of a warp
    total: int
    registers: int
    shared_bytes: int
    blocks: int  # that fit a multiprocessor of an H100 or H200


def cuobjdump() -> Path | None:
    """The program on PATH, or where its wheel puts it."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders for path in Path(folder).glob("cu*/bin/cuobjdump")), None)


def _dump(library: Path, flag: str) -> str:
    program = cuobjdump()
    if program is None:
        raise UserError("cuobjdump: not found; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = [str(program), flag, "--gpu-architecture", f"sm_{_ARCHITECTURE}", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": str(program.parent)})
    if done.returncode:
        raise UserError(f"cuobjdump: {done.stderr.strip()}")
    return done.stdout


def per_tile(code: list[tuple[int, str]]) -> int:
    """Instructions of the loops over tiles, by address: each loop that holds matrix products and no other such loop.

    The rest of a loop around them counts by its share of a tile.
    """
    places = {address: number for number, (address, _) in enumerate(code)}
    loops = set()
    for number, (address, text) in enumerate(code):
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address and any("MMA" in code[i][1] for i in range(
                places[int(branch[1], 16)], number)):  # fmt: skip
            loops.add((places[int(branch[1], 16)], number + 1))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    count = sum(end - start for start, end in inner)
    outer = max((end - start for start, end in loops - set(inner)), default=count)
    return count + (outer - count) // _TILES_OF_OUTER_LOOP


def _blocks(registers: int, shared_bytes: int) -> int:
    """By registers (65,536, handed out by 256 to a warp) and shared memory (228 KiB, of each block 1 KiB reserved)."""
    per_warp = -(-32 * registers // 256) * 256
    return min(65536 // per_warp // _WARPS, 228 * 1024 // (shared_bytes + 1024))


def counts(library: Path) -> dict[str, Counts]:
    """Of each kernel of the second generation in the library, by its name and the type of the decay."""
    resources = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", _dump(library, "--dump-resource-usage")))
    names = subprocess.run(["c++filt"], input="\n".join(resources), capture_output=True, text=True, check=True).stdout
    readable = dict(zip(resources, names.splitlines(), strict=True))
    shared = ctypes.CDLL(str(library)).wkv_cuda_shared
    shared.restype = ctypes.c_int64
    found = {}
    for part in _dump(library, "--dump-sass").split("Function : ")[1:]:
        symbol = part.split("\n", 1)[0].strip()
        kernel = re.fullmatch(r"void tiles::(\w+)<(\w+)>\(WkvProblem\)", readable[symbol])
        if kernel is None:
            continue
        code = [(int(address, 16), text.strip()) for address, text in _INSTRUCTION.findall(part)]
        size, registers = int(shared(_KERNELS.index(kernel[1]), int(kernel[2] == "float"))), int(resources[symbol])
        total = sum(not text.startswith("NOP") for _, text in code)
        name = f"{kernel[1]}, {'float32' if kernel[2] == 'float' else 'bfloat16'} decay"
        found[name] = Counts(per_tile(code), total, registers, size, _blocks(registers, size))
    return dict(sorted(found.items()))


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --record keep it as what the test compares with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help=f"keep the counts in {RECORDED.name}")
    flags = parser.parse_args(argv)
    found = counts(build.compiled(build.cuda_library(build.nvcc_architectures())))
    print(f"{'kernel':26} {'per tile':>8} {'total':>6} {'registers':>9} {'shared':>7} {'blocks':>6}")
    for name, x in found.items():
        print(f"{name:26} {x.per_tile:8} {x.total:6} {x.registers:9} {x.shared_bytes:7} {x.blocks:6}")
    if flags.record:
        RECORDED.write_text(json.dumps({name: asdict(x) for name, x in found.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
