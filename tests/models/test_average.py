from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models.average import average
from rwkv_speech.models.checkpoint import add_ctc, export_published, load_trained, named_tensors, write_checkpoint
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts

PARTS = Parts(
    load_model="/here/base.pth",
    base_sha256="ab" * 32,
    encoder="microsoft/wavlm-large",
    vocab_file="",
    n_layer=2,
    n_embd=8,
    stack=5,
    adapter_hidden=6,
    separator="#",
)
SHAPES = {"0.weight": (6, 10), "0.bias": (6,), "2.weight": (8, 6), "2.bias": (8,)}


def write(path: Path, seed: int, parts: Parts = PARTS, scale: float = 1.0, state: Tensor | None = None) -> Path:
    draw = torch.Generator().manual_seed(seed)
    adapter = {name: scale * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    drawn = scale * torch.randn(2, 2, 4, 4, generator=draw)
    states = {"asr": drawn if state is None else state}
    write_checkpoint(path, named_tensors(adapter, states), parts, None, {"wer": 0.1})
    return path


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"epoch-{i}.safetensors", seed=i) for i in range(3)]


def test_average_is_numpys_mean(three: list[Path], tmp_path: Path):
    average(three, tmp_path / "mean.safetensors")
    files = [load_file(path) for path in three]
    mean = load_file(tmp_path / "mean.safetensors")
    assert mean.keys() == files[0].keys()
    for name, x in mean.items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, np.mean([file[name].astype(np.float64) for file in files], axis=0), rtol=1e-7)


def test_sums_are_of_double_precision(tmp_path: Path):
    # In float32, 1e8 + 1 is 1e8: the mean of 1e8, 1 and -1e8 would be 0.
    states = [torch.full((2, 2, 4, 4), x) for x in (1e8, 1.0, -1e8)]
    paths = [write(tmp_path / f"{i}.safetensors", 0, state=state) for i, state in enumerate(states)]
    average(paths, tmp_path / "mean.safetensors")
    assert load_trained(tmp_path / "mean.safetensors").initial_states["asr"].unique().tolist() == pytest.approx([1 / 3])


def test_metadata_names_the_averaged_files(three: list[Path], tmp_path: Path):
    average(three[:2], tmp_path / "mean.safetensors")
    trained = load_trained(tmp_path / "mean.safetensors")
    assert trained.parts == PARTS
    named = [{"file": str(path), "sha256": sha256_file(path)} for path in three[:2]]
    assert trained.metrics == {"averaged": named}


def test_folders_mean_their_best_checkpoint(tmp_path: Path):
    for name, seed in (("a/best", 1), ("a/last", 2), ("b/last", 3)):
        write(tmp_path / f"{name}.safetensors", seed)
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean.safetensors")
    best, last, mean = (
        load_trained(tmp_path / name).initial_states["asr"]
        for name in ("a/best.safetensors", "b/last.safetensors", "mean.safetensors")
    )
    torch.testing.assert_close(mean, (best + last) / 2)


def test_the_place_of_the_base_model_does_not_matter(three: list[Path], tmp_path: Path):
    moved = write(tmp_path / "moved.safetensors", 9, replace(PARTS, load_model="/there/base.pth"))
    average([three[0], moved], tmp_path / "mean.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [("base_sha256", "cd" * 32), ("encoder", "other"), ("stack", 4), ("separator", "|"), ("vocab_file", "v.txt")],
)
def test_another_parts_is_an_error_that_names_the_file(three: list[Path], tmp_path: Path, name: str, value: object):
    other = write(tmp_path / "other.safetensors", 9, replace(PARTS, **{name: value}))
    with pytest.raises(UserError, match=f"other.safetensors: {name} is {value!r}, expected .* as in .*epoch-0"):
        average([three[0], three[1], other], tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


def test_another_shape_is_an_error_that_names_the_file(three: list[Path], tmp_path: Path):
    other = write(tmp_path / "other.safetensors", 9, state=torch.zeros(2, 2, 8, 8))
    with pytest.raises(
        UserError, match=r"other.safetensors: the shape of initial_states.asr is \(2, 2, 8, 8\), expected \(2, 2, 4"
    ):
        average([three[0], other], tmp_path / "mean.safetensors")


def test_a_number_that_is_not_finite_is_an_error(three: list[Path], tmp_path: Path):
    bad = write(tmp_path / "bad.safetensors", 9, scale=float("inf"))
    for paths in ([three[0], bad], [bad, three[0]]):
        with pytest.raises(UserError, match="bad.safetensors: .* not finite"):
            average(paths, tmp_path / "mean.safetensors")


def test_published_files_are_refused(three: list[Path], tmp_path: Path):
    export_published(load_trained(three[0]), tmp_path / "asr.pth")
    with pytest.raises(UserError, match=r"asr.pth: a published file .* expected an own .safetensors"):
        average([three[0], tmp_path / "asr.pth"], tmp_path / "mean.safetensors")


def test_too_few_or_repeated_files_are_errors(three: list[Path], tmp_path: Path):
    with pytest.raises(UserError, match="--checkpoints: found 1, expected two or more"):
        average(three[:1], tmp_path / "mean.safetensors")
    with pytest.raises(UserError, match=r"--checkpoints: .*epoch-0.safetensors is given twice"):
        average([three[0], three[1], three[0]], tmp_path / "mean.safetensors")


def test_output_must_be_a_new_safetensors_file(three: list[Path], tmp_path: Path):
    with pytest.raises(UserError, match="--output: found .*mean.pth'?, expected a name that ends in .safetensors"):
        average(three, tmp_path / "mean.pth")
    before = three[1].read_bytes()
    with pytest.raises(UserError, match="--output: .* is one of the checkpoints"):
        average(three, tmp_path / "." / three[1].name)
    assert three[1].read_bytes() == before


def test_ctc_head_stays_where_it_is_the_same_in_all(
    three: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    head = CtcHead(2, CtcSpec("ab", hidden=4))
    for path in three:
        add_ctc(path, head)
    average(three, tmp_path / "mean.safetensors")
    found = load_trained(tmp_path / "mean.safetensors").ctc_head()
    assert found is not None and found.spec == head.spec and not caplog.records
    assert all(torch.equal(x, head.state_dict()[name]) for name, x in found.state_dict().items())
    for other in (CtcHead(2, CtcSpec("ab", hidden=4)), CtcHead(2, CtcSpec("ac", hidden=4))):
        add_ctc(three[2], other)
        average(three, tmp_path / "mean.safetensors")
        assert load_trained(tmp_path / "mean.safetensors").ctc is None
    assert "CTC heads differ" in caplog.text
