"""Building the native kernels and choosing among them."""

import multiprocessing
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from wkv6_cases import random_inputs

from rwkv_speech.errors import UserError
from rwkv_speech.ops import build, native
from rwkv_speech.ops.wkv6 import wkv6, wkv6_backward
from rwkv_speech.ops.wkv6_ref import wkv6_ref

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A build folder with nothing in it, and no library loaded yet."""
    monkeypatch.setattr(build, "CACHE", tmp_path / "build")
    native._cpu.cache_clear()
    yield tmp_path
    native._cpu.cache_clear()


def test_unknown_form_names_the_flag_and_the_choices():
    with pytest.raises(UserError, match="--wkv6: found 'fast', expected one of auto, torch, steps, tiles"):
        native.kernels_for(torch.zeros(1, 2, 3, 64), "fast")


@needs_compiler
def test_cpu_kernel_serves_what_it_can():
    assert native.kernels_for(torch.zeros(1, 2, 3, 64)) is not None
    assert native.kernels_for(torch.zeros(1, 2, 3, 64, dtype=torch.float64)) is None
    assert native.kernels_for(torch.zeros(1, 2, 3, 48)) is None
    assert native.kernels_for(torch.zeros(1, 2, 3, 64), "torch") is None


def test_without_a_compiler_pytorch_serves_with_one_warning(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    inputs = random_inputs(1, 20, 2, 64, torch.float32)
    want = wkv6(*inputs, form="torch")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler found .* --wkv6 torch") as warnings:
        got = wkv6(*inputs)
        wkv6(*inputs)
    assert len(warnings) == 1
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_without_nvcc_the_error_names_it_and_the_flag(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"nvcc found neither in CUDA_HOME nor on PATH.* --wkv6 torch"):
        build.cuda_library(["90"])


def test_nvcc_of_cuda_home_and_of_pip_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for program in ("toolkit/bin/nvcc", "packages/nvidia/cu13/bin/nvcc"):
        (tmp_path / program).parent.mkdir(parents=True)
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    which = shutil.which
    monkeypatch.setattr(build.shutil, "which", lambda name: which(name) if name.startswith(str(tmp_path)) else None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert build.cuda_library(["90"]).tool == str(tmp_path / "toolkit/bin/nvcc")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert build.cuda_library(["90"]).tool == str(tmp_path / "packages/nvidia/cu13/bin/nvcc")


def test_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources, packaged = tmp_path / "cuda", tmp_path / "prebuilt"
    sources.mkdir()
    (sources / "wkv.h").write_text("int a;\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "PREBUILT", packaged)
    monkeypatch.setattr(build, "cpu_library", lambda: build.Target("empty", "g++", []))
    monkeypatch.setattr(build, "compiled", lambda target: sources / "wkv.h")
    assert build.prebuilt("wkv.h") is None
    build.main(["--only", "cpu"])
    assert build.prebuilt("wkv.h") == packaged / "wkv.h"
    (sources / "wkv.h").write_text("int b;\n")
    with pytest.warns(UserWarning, match="made from other sources than .*cuda, and is not used"):
        assert build.prebuilt("wkv.h") is None


@needs_compiler
def test_failed_build_shows_the_compiler_s_words_and_the_flag(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    sources = fresh / "cuda"
    sources.mkdir()
    (sources / "wkv_cpu_kernel.cpp").write_text("int broken = nonsense;\n")
    for name in ("wkv_cpu.cpp", "rwkv_cpu.cpp"):
        (sources / name).write_text("")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(UserError, match=r"(?s)failed, the whole log is .*log.txt; .*--wkv6 torch\n.*nonsense"):
        build.compiled(build.cpu_library())


ODD_NAME = "my clone, $HOME: 'a' \"b\" & (ü) #1 %"


def _odd_folder(parent: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with such a name, and in it the sources; the compiler's path has blanks, too."""
    folder, tools = parent / ODD_NAME, parent / "my tools"
    shutil.copytree(build.SOURCES, folder / "cuda")
    monkeypatch.setattr(build, "SOURCES", folder / "cuda")
    monkeypatch.setattr(build, "CACHE", folder / "build")
    tools.mkdir()
    for name in ("g++", "clang++", "c++", "nvcc"):
        if path := shutil.which(name):
            (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(path)} "$@"\n')
            (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return folder


@needs_compiler
def test_cpu_kernel_is_built_in_a_folder_of_any_name(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    folder = _odd_folder(fresh, monkeypatch)
    target = build.cpu_library()
    assert Path(target.tool).parent.name == "my tools"
    assert build.compiled(target).is_relative_to(folder)
    inputs = random_inputs(1, 5, 2, 64, torch.float32)
    assert native.kernels_for(inputs[0]) is not None
    for got, want in zip(wkv6(*inputs), wkv6_ref(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not build.has_nvcc(), reason="no nvcc")
def test_nvcc_compiles_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = _odd_folder(tmp_path, monkeypatch)
    (folder / "cuda/wkv_cuda.cu").write_text('#include "wkv.h"\n__global__ void nothing() {}\n')
    assert build.compiled(build.cuda_library(build.nvcc_architectures()[-1:])).is_relative_to(folder)


@needs_compiler
@pytest.mark.parametrize("has_ninja", [True, False])
def test_steps_run_with_ninja_and_where_there_is_none(has_ninja: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = _odd_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: has_ninja or None)
    first, last = _tiny_step(), build.Step("libtwo.so", [_tiny_step().command[0], "-shared"], ["one.o"])
    first = build.Step("one.o", [*first.command[:1], "-c", "-fPIC", "-x", "c++"], first.sources)
    built = build.compiled(build.Target("two", first.command[0], [first, last]))
    assert built.is_relative_to(folder) and built.stat().st_size > 0
    assert (built.parent / "build.ninja").exists() is has_ninja
    broken = build.Step("one.o", [*first.command, "-DX=1", "-fno-such-flag"], first.sources)
    with pytest.raises(UserError, match=r"(?s)failed, .*no-such-flag"):
        build.compiled(build.Target("broken", first.command[0], [broken, last]))


def test_without_sources_the_error_says_where_they_were_sought(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(build, "SOURCES", tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no sources in .*nothing; install from a checkout"):
        build.compiled(build.Target("wkv_cpu", "g++", []))


def _build(folder: Path, results: "multiprocessing.Queue[str]") -> None:
    build.CACHE = folder
    results.put(str(build.compiled(build.Target("empty", build.cpu_library().tool, [_tiny_step()]))))


def _tiny_step() -> build.Step:
    compiler = build.cpu_library().tool
    return build.Step("libempty.so", [compiler, "-shared", "-fPIC", "-x", "c++"], ["wkv.h"])


@needs_compiler
def test_processes_that_build_at_once_share_one_result(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_build, args=(tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(paths) == 1
    assert Path(paths.pop()).exists()
    assert not list(tmp_path.rglob("*.pending"))


@needs_compiler
def test_changed_source_is_built_anew(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    sources = fresh / "cuda"
    sources.mkdir()
    monkeypatch.setattr(build, "SOURCES", sources)
    target = build.Target("empty", build.cpu_library().tool, [_tiny_step()])
    (sources / "wkv.h").write_text("int a;\n")
    first = build.compiled(target)
    assert build.compiled(target) == first
    (sources / "wkv.h").write_text("int b;\n")
    assert build.compiled(target) != first


@needs_compiler
@pytest.mark.parametrize("bounds", [None, [0, 40, 40, 340, 771]], ids=["dense", "packed"])
def test_threads_do_not_change_a_bit(bounds: list[int] | None):
    B, T, S = (3, 257, 3) if bounds is None else (1, bounds[-1], len(bounds) - 1)
    inputs = random_inputs(B, T, 5, 64, torch.float32, sequences=S)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    dy, dlast = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5, 7):  # of 5 heads
        torch.set_num_threads(count)
        results.append((*wkv6(*inputs, cu_seqlens), *wkv6_backward(dy, dlast, *inputs, cu_seqlens, True, "auto")))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
