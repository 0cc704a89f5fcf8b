"""Compiles the native kernels in `cuda/` once, when they are first needed; the only file that names compiler flags.

Results lie in `build/` beside `cuda/`, or where a wheel is installed in the user's cache, in a folder named by what
went into them, so that a changed source, flag or compiler never meets an old library. `python -m rwkv_speech.ops.build`
compiles ahead of time, into the package: a wheel made after it needs no compiler where it is installed.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_speech.errors import UserError, exit_code

_SOURCES = Path(__file__).parent / "sources"  # in a checkout a link to cuda/, in a wheel its files
SOURCES = _SOURCES.resolve()
CACHE = SOURCES.parent / "build" if _SOURCES.is_symlink() else Path.home() / ".cache" / "rwkv_speech"
PREBUILT = Path(__file__).parent / "prebuilt"
# What a wheel is built for: Ampere, Ada, Hopper and, where the compiler knows them, Blackwell.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

_CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra", "-ffp-contract=fast"]
_HOST_RUN_FLAGS = ["-O1", "-g", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC -Xptxas --warn-on-spills -cudart static --threads 0".split()
# One kernel source for all, so that the best one can be chosen when it runs.
_ISA_FLAGS = {"avx512": ["-march=x86-64-v4"], "avx2": ["-march=x86-64-v3"], "plain": []}


@dataclass(frozen=True)
class Step:
    """One call of a compiler: `sources` -> `output`, its objects among them by name."""

    output: str
    command: list[str]
    sources: list[str]


@dataclass(frozen=True)
class Target:
    """What is built: the last step's output is the result."""

    name: str
    tool: str
    steps: list[Step]


def cpu_library() -> Target:
    """The CPU kernels, once per instruction set."""
    compiler = _find_compiler()
    command = [compiler, *_CXX_FLAGS]
    sets = list(_ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["plain"]
    steps = [
        Step(f"kernel_{isa}.o", [*command, *_ISA_FLAGS[isa], f"-DWKV_ISA={isa}", "-c"], ["wkv_cpu_kernel.cpp"])
        for isa in sets
    ]
    objects = [step.output for step in steps]
    steps.append(Step("libwkv_cpu.so", [*command, "-shared"], ["wkv_cpu.cpp", "rwkv_cpu.cpp", *objects]))
    return Target("wkv_cpu", compiler, steps)


def cuda_library(architectures: Sequence[str]) -> Target:
    """The CUDA kernels for these compute capabilities, such as "90"."""
    compiler = _find_nvcc()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes.append("-gencode=arch=compute_{0},code=compute_{0}".format(architectures[-1]))  # for GPUs yet to come
    step = Step("libwkv_cuda.so", [compiler, *_NVCC_FLAGS, *codes, "-shared"], ["wkv_cuda.cu"])
    return Target("wkv_cuda", compiler, [step])


def host_run() -> Target:
    """The program that runs the CUDA kernels' source on the CPU, under the sanitizers."""
    compiler = _find_compiler()
    step = Step("host_run", [compiler, *_HOST_RUN_FLAGS, *_SANITIZERS], ["host_run.cpp"])
    return Target("host_run", compiler, [step])


def nvcc_architectures() -> list[str]:
    """Those of ARCHITECTURES that the installed nvcc can compile for; raises UserError if there is no nvcc."""
    listed = subprocess.run([_find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in ARCHITECTURES if f"compute_{arch}\n" in listed]


def compiled(target: Target) -> Path:
    """The path of the target's result, compiled if it is not there yet; raises UserError with the compiler's words.

    Of several processes one compiles and the others wait; a killed one leaves nothing that blocks or misleads.
    """
    if not SOURCES.is_dir():
        raise UserError(
            f"native kernels: no sources in {SOURCES}; install from a checkout, or a wheel that holds the "
            f"libraries (cuda/README.md), or {_REMEDY}"
        )
    folder = CACHE / f"{target.name}-{_key(target)}"
    result = folder / target.steps[-1].output
    if result.exists():
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                os.replace(_compile(target, folder), result)
    except OSError as error:
        raise UserError(f"native kernels: cannot write {folder} ({error}); mend that, or {_REMEDY}") from error
    return result


_REMEDY = "choose the PyTorch form with --wkv6 torch"


def prebuilt(name: str) -> Path | None:
    """A library in the package, unless, with a warning, the sources beside it are others than it was made from."""
    path = PREBUILT / name
    if not path.exists():
        return None
    made_from = path.with_suffix(".sources")
    if SOURCES.is_dir() and not (made_from.exists() and made_from.read_text() == _sources_digest()):
        warnings.warn(
            f"{path} was made from other sources than {SOURCES}, and is not used; "
            "python -m rwkv_speech.ops.build makes it anew",
            stacklevel=2,
        )
        return None
    return path


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp", ".cu")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _key(target: Target) -> str:
    version = subprocess.run([target.tool, "--version"], capture_output=True, check=False)
    digest = hashlib.sha256(version.stdout)
    digest.update(repr(target.steps).encode() + _sources_digest().encode())
    return digest.hexdigest()[:12]


def _compile(target: Target, folder: Path) -> Path:
    """Run the steps in `folder`; the result has a name of its own until it is complete.

    Ninja runs what it can at once; where that is not installed, as on a machine that has torch alone, one step follows
    the other. Paths are relative to `folder`, so that ninja's file and the shell behind it read no odd names but the
    compiler's.
    """
    cuda, pending = os.path.relpath(SOURCES, folder.resolve()), f"{target.steps[-1].output}.pending"
    calls = list[_Call]()
    for step in target.steps:
        inputs = [name if name.endswith(".o") else os.path.join(cuda, name) for name in step.sources]
        calls.append(_Call(step.command, inputs, pending if step is target.steps[-1] else step.output))
    returncode, log = (_with_ninja if importlib.util.find_spec("ninja") else _in_order)(calls, folder)
    (folder / "log.txt").write_text(log, encoding="utf-8", errors="replace")
    if returncode:
        tail = "\n".join(log.splitlines()[-20:])
        raise UserError(
            f"native kernels: {target.tool} failed, the whole log is {folder / 'log.txt'}; mend that, or "
            f"{_REMEDY}\n{tail}"
        )
    return folder / pending


class _Call(NamedTuple):
    command: list[str]
    inputs: list[str]
    output: str


def _with_ninja(calls: Sequence[_Call], folder: Path) -> tuple[int, str]:
    """The exit status and what was said."""
    import ninja

    with (folder / "build.ninja").open("w", encoding="utf-8") as file:
        writer: Any = ninja.ninja_syntax.Writer(file)  # type: ignore[arg-type]  # its stub is wrong
        for number, call in enumerate(calls):
            # Of a command ninja reads the dollars, the shell the rest; of a path the writer escapes all.
            writer.rule(f"step{number}", shlex.join(call.command).replace("$", "$$") + " $in -o $out")
            writer.build(call.output, f"step{number}", call.inputs)
    return _run([str(Path(ninja.BIN_DIR) / "ninja"), "--quiet"], folder)


def _in_order(calls: Sequence[_Call], folder: Path) -> tuple[int, str]:
    """The exit status of the first that failed, else 0, and what all said until then."""
    returncode, log = 0, ""
    for call in calls:
        returncode, said = _run([*call.command, *call.inputs, "-o", call.output], folder)
        log += said
        if returncode:
            break
    return returncode, log


def _run(command: Sequence[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    return done.returncode, done.stdout + done.stderr


def _find_compiler() -> str:
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise UserError(f"native kernels: no C++ compiler found (g++, clang++ or c++); install one, or {_REMEDY}")


def has_nvcc() -> bool:
    """Whether the CUDA kernels can be compiled here."""
    return _nvcc() is not None


def _nvcc() -> str | None:
    """From CUDA_HOME, on PATH, where the toolkit installs itself, or from the wheel nvidia-cuda-nvcc."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (wheels.submodule_search_locations or () if wheels else ())]
    home = os.environ.get("CUDA_HOME")
    places = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    places += [str(path) for folder in folders for path in sorted(folder.glob("cu*/bin/nvcc"))]
    return next((path for place in places if (path := shutil.which(place))), None)


def _find_nvcc() -> str:
    if path := _nvcc():
        return path
    raise UserError(
        "native kernels: nvcc found neither in CUDA_HOME nor on PATH, in /usr/local/cuda/bin or as the package "
        f"nvidia-cuda-nvcc; install the CUDA toolkit, or {_REMEDY}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Compile what this machine has compilers for into the package, ready for `pip wheel .`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=("cpu", "cuda"), help="just one of the two libraries")
    only = parser.parse_args(argv).only
    PREBUILT.mkdir(exist_ok=True)
    targets = [cpu_library()] if only != "cuda" else []
    if only == "cuda" or (only is None and has_nvcc()):
        targets.append(cuda_library(nvcc_architectures()))
    for target in targets:
        library = Path(shutil.copy(compiled(target), PREBUILT))
        library.with_suffix(".sources").write_text(_sources_digest())
        print(library)


if __name__ == "__main__":
    sys.exit(exit_code(main))
