"""The machine code of the tiles kernels: counted right, and no longer than what is recorded."""

import json
import shutil

import pytest
from benchmarks import instructions

from rwkv_speech.ops import build


def test_loops_over_tiles_are_counted():
    #         outer loop of 10, in it a loop of 4 over tiles and one of 3, before it a loop without products
    text = ["MOV", "@P0 BRA 0x0", "MOV"]
    text += ["HMMA", "FADD", "FADD", "@!P0 BRA 0x30"]
    text += ["MMA", "FADD", "@P1 BRA 0x70", "FADD", "FADD", "@P0 BRA 0x30", "EXIT"]
    assert instructions.per_tile([(16 * i, x) for i, x in enumerate(text)]) == 4 + 3 + 3 // 4


@pytest.mark.skipif(not build.has_nvcc(), reason="no nvcc")
@pytest.mark.skipif(instructions.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_no_count_rises_by_more_than_a_twentieth():
    found = instructions.counts(build.compiled(build.cuda_library(build.nvcc_architectures())))
    recorded = json.loads(instructions.RECORDED.read_text())
    assert set(found) == set(recorded)
    for name, counts in recorded.items():
        for what, count in counts.items():
            now = getattr(found[name], what)
            enough = now >= count if what == "blocks" else now <= 1.05 * count
            assert enough, f"{name}: {what} was {count}, is {now}; python -m benchmarks.instructions --record keeps it"
