"""Base model files: both formats, every kind of damage, and the memory that loading takes."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import RANDOM_TENSORS, random_rwkv6_tensors, random_rwkv7_tensors
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.models.base import RWKV6Sizes, RWKV7Sizes, open_base, read_tensors
from rwkv_speech.models.families import lm_of, read_lm, read_sizes
from rwkv_speech.models.rwkv6 import RWKV6

SUFFIXES = [".pth", ".safetensors"]


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pretrained_pth_equals_safetensors(dtype: torch.dtype, tmp_path: Path):
    tensors = random_rwkv6_tensors(dtype=torch.bfloat16)
    models = [RWKV6.from_pretrained(write(tensors, tmp_path / f"base{suffix}"), dtype) for suffix in SUFFIXES]
    one, other = (model.state_dict() for model in models)
    assert list(one) == list(other)
    assert set(one) == set(tensors)
    for key, x in tensors.items():
        assert one[key].dtype == dtype
        assert torch.equal(one[key], x.to(dtype)) and torch.equal(other[key], one[key])
    assert not models[0].training and not any(x.requires_grad for x in models[0].parameters())


def test_sizes_come_from_the_tensors(tmp_path: Path):
    sizes = {"n_layer": 3, "C": 192, "vocab": 100, "mix_rank": 32, "decay_rank": 64, "ffn": 672}
    found = RWKV6Sizes.of(random_rwkv6_tensors(**sizes), "base.pth")
    assert found == RWKV6Sizes(**sizes, H=3)
    assert found.N == 64
    sizes = {"n_layer": 3, "C": 192, "vocab": 100, "decay_rank": 64, "rate_rank": 48, "value_rank": 32, "ffn": 768}
    found = RWKV7Sizes.of(random_rwkv7_tensors(**sizes, gate_rank=128), "base.pth")
    assert found == RWKV7Sizes(**sizes, gate_rank=128, H=3)


@pytest.mark.parametrize(
    ("key", "family"), [("r_k", "x070"), ("time_maa_w1", "x060"), ("time_faaaa", "x052"), ("time_first", "x04")]
)
def test_open_base_says_the_family(key: str, family: str, tmp_path: Path):
    tensors = random_rwkv6_tensors() if family == "x060" else {f"blocks.0.att.{key}": torch.zeros(2)}
    path = write(tensors, tmp_path / "base.pth")
    assert open_base(path)[0] == family
    if family != "x060":
        with pytest.raises(UserError, match=rf"base\.pth: found an {family} model, expected RWKV-6 \(x060\)"):
            RWKV6.from_pretrained(path)
    if family in ("x052", "x04"):
        with pytest.raises(UserError, match=rf"an {family} model, expected RWKV-6 \(x060\) or RWKV-7 \(x070\)"):
            read_lm(path)


@pytest.mark.parametrize("family", RANDOM_TENSORS)
def test_a_file_s_family_decides_the_model(family: str, tmp_path: Path):
    path = write(RANDOM_TENSORS[family](), tmp_path / "base.safetensors")
    model = read_lm(path, torch.bfloat16)
    assert family == model.FAMILY and model.emb.weight.dtype == torch.bfloat16
    assert read_sizes(path) == model.sizes
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in lm_of(model.sizes).named_parameters()}
    assert shapes == {name: x.shape for name, x in model.named_parameters()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_wrong_tensor_is_in_one_message(suffix: str, tmp_path: Path):
    tensors = random_rwkv6_tensors()
    del tensors["blocks.1.ffn.receptance.weight"]
    del tensors["ln_out.bias"]
    tensors["blocks.0.att.time_state"] = torch.zeros(2, 64, 64)
    tensors["head.weight"] = torch.zeros(5, 128)
    tensors["blocks.0.att.time_decay"] = torch.zeros(128)
    path = write(tensors, tmp_path / f"base{suffix}")
    with pytest.raises(UserError) as error:
        RWKV6.from_pretrained(path)
    message = str(error.value)
    assert str(path) in message
    lines = {line.strip() for line in message.splitlines()[1:]}
    assert lines == {
        "missing blocks.1.ffn.receptance.weight, expected shape (128, 128)",
        "missing ln_out.bias, expected shape (128,)",
        "unknown blocks.0.att.time_state, found shape (2, 64, 64)",
        "head.weight: found shape (5, 128), expected (272, 128)",
        "blocks.0.att.time_decay: found shape (128,), expected (1, 1, 128)",
    }


def test_a_file_with_a_layer_left_out_is_refused(tmp_path: Path):
    tensors = {key: x for key, x in random_rwkv6_tensors(n_layer=3).items() if not key.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"missing blocks\.1\.ln1\.weight"):
        RWKV6.from_pretrained(write(tensors, tmp_path / "base.pth"))


@pytest.mark.parametrize(
    "tensors", [{}, {"emb.weight": torch.zeros(5, 64)}, {"model.layers.0.weight": torch.zeros(3)}], ids=len
)
def test_another_model_is_refused(tensors: dict[str, Tensor], tmp_path: Path):
    with pytest.raises(UserError, match=r"base\.pth: not an RWKV(-6 \(x060\))? model.*RWKV-x060-World"):
        RWKV6.from_pretrained(write(tensors, tmp_path / "base.pth"))


@pytest.mark.parametrize(
    "content", [[torch.zeros(3)], {"emb.weight": 3}, torch.zeros(3)], ids=lambda x: type(x).__name__
)
def test_a_file_of_other_things_is_refused(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "base.pth")
    with pytest.raises(UserError, match=r"base\.pth: expected a dictionary of tensors"):
        read_tensors(tmp_path / "base.pth")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage",
        lambda data: bytes(1000),
        lambda data: data[: len(data) // 2],
        lambda data: data[:5000],
    ],
    ids=["empty", "garbage", "zeros", "truncated", "begun"],
)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], suffix: str, tmp_path: Path):
    path = write(random_rwkv6_tensors(n_layer=1), tmp_path / f"base{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        RWKV6.from_pretrained(path)
    assert str(path) in str(error.value)
    assert "cannot be read" in str(error.value) and "download it again" in str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(suffix: str, tmp_path: Path):
    for path in (tmp_path / f"nothing{suffix}", tmp_path):
        with pytest.raises(UserError, match="no such file") as error:
            RWKV6.from_pretrained(path)
        assert str(path) in str(error.value)


class Attack:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "pickle"])
def test_code_in_a_file_is_not_run(as_zip: bool, tmp_path: Path):
    content = {"emb.weight": torch.zeros(3), "attack": Attack(tmp_path / "made")}
    if as_zip:
        torch.save(content, tmp_path / "base.pth")
    else:
        (tmp_path / "base.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"base\.pth: cannot be read"):
        RWKV6.from_pretrained(tmp_path / "base.pth")
    assert not (tmp_path / "made").exists()


# VmHWM belongs to the process alone; ru_maxrss would start from its parent's memory.
LOAD = """
import json, sys
import torch
from rwkv_speech.models.rwkv6 import RWKV6

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

RWKV6.from_pretrained(sys.argv[2], torch.bfloat16)  # what a first load imports counts for no file
before = peak()
model = RWKV6.from_pretrained(sys.argv[1], torch.bfloat16)
loaded = peak()
for x in model.parameters():
    x.flatten()[::1024].sum()  # a value of every page
print(json.dumps([before, loaded, peak()]))
"""


def assert_memory_stays_near_the_file(sizes: RWKV6Sizes, path: Path) -> None:
    """Loads a file of these sizes in another process, which then reads all of it."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in RWKV6(sizes).named_parameters()}
    tiny = write(random_rwkv6_tensors(n_layer=1, dtype=torch.bfloat16), path.with_name(f"tiny{path.suffix}"))
    try:
        write({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
        size = path.stat().st_size
        command = [sys.executable, "-c", LOAD, str(path), str(tiny)]
        before, loaded, used = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    finally:
        path.unlink(missing_ok=True)
    print(f"file {size / 1e9:.2f} GB, loaded {(loaded - before) / size:.2f}x, used {(used - before) / size:.2f}x")
    assert loaded - before <= 1.2 * size
    assert 0.9 * size <= used - before <= 1.2 * size


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_from_pretrained_memory_stays_near_the_file(suffix: str, tmp_path: Path):
    sizes = RWKV6Sizes(vocab=8192, n_layer=4, C=1024, H=16, ffn=3584, mix_rank=32, decay_rank=64)
    assert_memory_stays_near_the_file(sizes, tmp_path / f"base{suffix}")


@pytest.mark.soak
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_from_pretrained_memory_of_the_1b6_model(suffix: str, tmp_path: Path):
    sizes = RWKV6Sizes(vocab=65536, n_layer=24, C=2048, H=32, ffn=7168, mix_rank=32, decay_rank=64)
    assert_memory_stays_near_the_file(sizes, tmp_path / f"base{suffix}")
