import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import (
    FORMAT,
    FORMAT_1,
    Trained,
    add_confidence,
    add_ctc,
    export_published,
    find_checkpoint,
    load_trained,
    named_tensors,
    write_checkpoint,
)
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts, TrainedOn

LAYERS, HEADS, HEAD_SIZE, WIDTH, HIDDEN = 3, 2, 4, 10, 6
PARTS = Parts(
    load_model="/models/base.pth",
    base_sha256="ab" * 32,
    encoder="microsoft/wavlm-large",
    n_layer=LAYERS,
    n_embd=HEADS * HEAD_SIZE,
    stack=5,
    adapter_hidden=HIDDEN,
    separator="#",
)
TRAINED_ON = TrainedOn(utterances=7, hours=0.5, longest_seconds=16.25)


def make_adapter() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (HIDDEN, WIDTH), "0.bias": (HIDDEN,), "2.weight": (8, HIDDEN), "2.bias": (8,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def make_state() -> Tensor:
    return torch.randn(LAYERS, HEADS, HEAD_SIZE, HEAD_SIZE, generator=torch.Generator().manual_seed(1))


def published(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The layout of the published files, written out by hand."""
    adapter, state = make_adapter(), make_state()
    tensors = {
        "language_model.blocks.0.att.time_state": state[0],
        "language_model.blocks.1.att.time_state": state[1],
        "language_model.blocks.2.att.time_state": state[2],
        "speech_encoder.adapter.0.weight": adapter["0.weight"],
        "speech_encoder.adapter.0.bias": adapter["0.bias"],
        "speech_encoder.adapter.2.weight": adapter["2.weight"],
        "speech_encoder.adapter.2.bias": adapter["2.bias"],
    }
    return {name: x.to(dtype, copy=True) for name, x in tensors.items()}


def save(path: Path, **metrics: object) -> Path:
    write_checkpoint(path, named_tensors(make_adapter(), {"asr": make_state()}), PARTS, TRAINED_ON, metrics)
    return path


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name


def test_own_checkpoint_comes_back_bit_for_bit(tmp_path: Path):
    path = save(tmp_path / "run" / "last.safetensors", wer=0.25, step=7, name="ü")
    trained = load_trained(path)
    assert_same_bits(trained.adapter, make_adapter())
    assert_same_bits(trained.initial_states, {"asr": make_state()})
    assert (trained.parts, trained.trained_on) == (PARTS, TRAINED_ON)
    assert trained.metrics == {"wer": 0.25, "step": 7, "name": "ü"}
    assert (trained.path, trained.ignored) == (path, ())


def test_own_checkpoint_of_parameters_that_train(tmp_path: Path):
    adapter = {name: torch.nn.Parameter(x) for name, x in make_adapter().items()}
    tensors = named_tensors(adapter, {"asr": torch.nn.Parameter(make_state())})
    write_checkpoint(tmp_path / "a.safetensors", tensors, PARTS, None, {})
    assert_same_bits(load_trained(tmp_path / "a.safetensors").adapter, make_adapter())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_file_loads(tmp_path: Path, dtype: torch.dtype):
    torch.save(published(dtype), tmp_path / "a.pth")
    trained = load_trained(str(tmp_path / "a.pth"))
    assert_same_bits(trained.adapter, {name: x.to(dtype) for name, x in make_adapter().items()})
    assert_same_bits(trained.initial_states, {"asr": make_state().to(dtype)})
    assert (trained.parts, trained.trained_on, trained.metrics, trained.ignored) == (None, None, {}, ())
    assert list(load_trained(tmp_path / "a.pth", "st").initial_states) == ["st"]


def test_published_file_keeps_the_order_of_many_layers(tmp_path: Path):
    """Layer 10 comes after layer 9, not after layer 1."""
    tensors = {name: x for name, x in published().items() if "adapter" in name}
    layers = {f"language_model.blocks.{i}.att.time_state": torch.full((1, 1, 1), float(i)) for i in range(12)}
    torch.save(dict(sorted((tensors | layers).items(), reverse=True)), tmp_path / "a.pth")
    assert load_trained(tmp_path / "a.pth").initial_states["asr"].flatten().tolist() == list(range(12))


def test_published_file_with_the_whole_model_names_what_it_ignores(tmp_path: Path):
    others = [
        "language_model.emb.weight",
        "language_model.blocks.0.att.time_faaaa",
        "language_model.blocks.0.att.time_state_old",
        "speech_encoder.model.encoder.layers.0.weight",
    ]
    torch.save(published() | {name: torch.zeros(2) for name in others}, tmp_path / "a.pth")
    trained = load_trained(tmp_path / "a.pth")
    assert sorted(trained.ignored) == sorted(others)
    assert_same_bits(trained.adapter, make_adapter())


def test_export_published_has_the_published_keys_and_the_same_bits(tmp_path: Path):
    trained = load_trained(save(tmp_path / "a.safetensors"))
    export_published(trained, tmp_path / "out" / "a.pth")
    assert_same_bits(torch.load(tmp_path / "out" / "a.pth", weights_only=True), published())
    again = load_trained(tmp_path / "out" / "a.pth")
    assert_same_bits(again.adapter, trained.adapter)
    assert_same_bits(again.initial_states, trained.initial_states)


def test_format_1_still_loads(tmp_path: Path):
    """As it was written: the published names, and metadata with an origin."""
    origin = {
        "base_model": "/models/base.pth", "base_sha256": "ab" * 32, "encoder": "microsoft/wavlm-large",
        "vocab_file": "", "n_layer": LAYERS, "n_embd": 8, "stack": 5, "adapter_hidden": HIDDEN,
        "separator": "#", "task": "st",
    }  # fmt: skip
    metadata = {"format": FORMAT_1, "origin": json.dumps(origin), "metrics": '{"wer": 0.5}'}
    save_file(published(), tmp_path / "a.safetensors", metadata)
    trained = load_trained(tmp_path / "a.safetensors")
    assert_same_bits(trained.adapter, make_adapter())
    assert_same_bits(trained.initial_states, {"st": make_state()})
    assert (trained.parts, trained.trained_on, trained.metrics) == (PARTS, None, {"wer": 0.5})


def test_several_states_come_back_and_one_is_exported(tmp_path: Path):
    states = {"asr": make_state(), "st": make_state() + 1}
    write_checkpoint(tmp_path / "a.safetensors", named_tensors(make_adapter(), states), PARTS, None, {})
    trained = load_trained(tmp_path / "a.safetensors")
    assert_same_bits(trained.initial_states, states)
    with pytest.raises(UserError, match=r"found several states, expected one of asr, st; name it with --task"):
        export_published(trained, tmp_path / "a.pth")
    with pytest.raises(UserError, match="found no state named 'qa'"):
        export_published(trained, tmp_path / "a.pth", "qa")
    export_published(trained, tmp_path / "a.pth", "st")
    assert_same_bits(load_trained(tmp_path / "a.pth", "st").initial_states, {"st": states["st"]})


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no checkpoint, and what the error has to say of each."""
    whole = save(folder / "whole.safetensors").read_bytes()
    torch.save(published(), folder / "whole.pth")
    zipped = (folder / "whole.pth").read_bytes()
    for suffix, content in (("safetensors", whole), ("pth", zipped)):
        (folder / f"garbage.{suffix}").write_bytes(bytes(range(256)) * 20)
        (folder / f"cut.{suffix}").write_bytes(content[: len(content) * 2 // 3])
        (folder / f"empty.{suffix}").write_bytes(b"")
    without = published()
    del without["language_model.blocks.1.att.time_state"]
    torch.save(without, folder / "layer.pth")
    state_only = {name: x for name, x in published().items() if "time_state" in name}
    torch.save(state_only, folder / "state.pth")
    torch.save({name: x for name, x in published().items() if "time_state" not in name}, folder / "adapter.pth")
    torch.save(published() | {"speech_encoder.adapter.4.weight": torch.zeros(1)}, folder / "more.pth")
    torch.save([1, 2], folder / "list.pth")
    uneven = published() | {"language_model.blocks.1.att.time_state": torch.zeros(HEADS, 5, 5)}
    torch.save(uneven, folder / "uneven.pth")
    save_file(published(), folder / "foreign.safetensors")
    stripped = {"format": FORMAT, "parts": "{}", "metrics": "["}
    save_file(named_tensors(make_adapter(), {"asr": make_state()}), folder / "stripped.safetensors", stripped)
    save_file(published(), folder / "headless.safetensors", {"format": FORMAT})
    return {
        "garbage.safetensors": "cannot be read as safetensors",
        "cut.safetensors": "cannot be read as safetensors",
        "empty.safetensors": "cannot be read as safetensors",
        "garbage.pth": "cannot be read as a torch zip",
        "cut.pth": "cannot be read as a torch zip",
        "empty.pth": "cannot be read as a torch zip",
        "missing.pth": "no such file",
        "layer.pth": r"layers \[1\] are missing",
        "state.pth": "found 1 initial states and the adapter tensors \\[\\]",
        "adapter.pth": "found 0 initial states",
        "more.pth": "4.weight",
        "list.pth": "expected a dictionary of tensors, found list",
        "uneven.pth": "time_state",
        "foreign.safetensors": "found format None, expected 'rwkv_speech-2'",
        "stripped.safetensors": "its metadata is damaged",
        "headless.safetensors": "parts",
    }


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("broken")
    return folder, broken_files(folder)


BROKEN = [
    *(f"{fault}.{suffix}" for fault in ("garbage", "cut", "empty") for suffix in ("safetensors", "pth")),
    *("missing.pth", "layer.pth", "state.pth", "adapter.pth", "more.pth", "list.pth", "foreign.safetensors"),
    *("uneven.pth", "stripped.safetensors", "headless.safetensors"),
]


@pytest.mark.parametrize("name", BROKEN)
def test_load_trained_names_file_and_fault(broken: tuple[Path, dict[str, str]], name: str):
    folder, faults = broken
    with pytest.raises(UserError, match=faults[name]) as caught:
        load_trained(folder / name)
    assert str(folder / name) in str(caught.value)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("a pickle was run",)


def test_load_trained_runs_no_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"a": Payload()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth"):
        load_trained(tmp_path / "a.pth")
    assert "a pickle was run" not in capsys.readouterr().out


def test_find_checkpoint_takes_best_before_last_before_the_only_one(tmp_path: Path):
    only = tmp_path / "published.pth"
    only.touch()
    assert find_checkpoint(tmp_path) == only and find_checkpoint(only) == only
    (tmp_path / "last.safetensors").touch()
    assert find_checkpoint(str(tmp_path)) == tmp_path / "last.safetensors"
    (tmp_path / "best.safetensors").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "best.safetensors"
    assert find_checkpoint(only) == only


def test_find_checkpoint_never_chooses_among_several(tmp_path: Path):
    for name in ("b.pth", "a.pth", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"found 2 checkpoints \(a\.pth, b\.pth\)") as caught:
        find_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value) and "--checkpoint" in str(caught.value)


@pytest.mark.parametrize("folder", ["there", "gone"])
def test_find_checkpoint_names_an_empty_folder(tmp_path: Path, folder: str):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    with pytest.raises(UserError, match="found no trained weights there") as caught:
        find_checkpoint(tmp_path / folder)
    assert str(tmp_path / folder) in str(caught.value) and "train first" in str(caught.value)


def test_find_checkpoint_ignores_a_half_written_file(tmp_path: Path):
    (tmp_path / "a.pth").touch()
    (tmp_path / ".last.safetensors.x1y2").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "a.pth"


def test_trained_is_what_export_takes(tmp_path: Path):
    trained = Trained(tmp_path / "x", make_adapter(), {"asr": make_state().bfloat16()}, None, None, (), {})
    export_published(trained, tmp_path / "a.pth")
    tensors = torch.load(tmp_path / "a.pth", weights_only=True)
    assert {x.dtype for name, x in tensors.items() if "time_state" in name} == {torch.bfloat16}


def test_the_same_checkpoint_is_the_same_file_every_time(tmp_path: Path):
    """As read by a library of its own, too: the header is rewritten."""
    parts = Parts("base «é»", "wavlm", "", 2, 16, "#", 1, 32, "00")
    adapter = {name: torch.randn(3, 5) for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    tensors = named_tensors(adapter, {"asr": torch.randn(2, 1, 4, 4)})
    for number in range(8):
        write_checkpoint(tmp_path / f"{number}.safetensors", tensors, parts, TRAINED_ON, {"wer": 0.5, "step": 3})
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}) == 1
    assert load_trained(tmp_path / "0.safetensors").parts == parts
    assert torch.equal(load_file(tmp_path / "0.safetensors")["adapter.0.bias"], adapter["0.bias"])


def test_ctc_head_is_added_and_all_else_stays(tmp_path: Path):
    path = save(tmp_path / "last.safetensors", wer=0.25)
    before = load_trained(path)
    assert before.ctc is None and before.ctc_head() is None
    head = CtcHead(WIDTH, CtcSpec(" aü天", hidden=8, kernel=3, start_shift=-0.01, end_shift=0.03))
    add_ctc(path, head)
    after = load_trained(path)
    assert_same_bits(after.named_tensors(), before.named_tensors())
    assert (after.parts, after.trained_on, after.metrics, after.ignored) == (PARTS, TRAINED_ON, {"wer": 0.25}, ())
    found = after.ctc_head()
    assert found is not None and found.spec == head.spec and not any(x.requires_grad for x in found.parameters())
    assert_same_bits(found.state_dict(), head.state_dict())
    add_ctc(path, other := CtcHead(WIDTH, CtcSpec("x", hidden=4)))
    replaced = load_trained(path).ctc_head()
    assert replaced is not None
    assert_same_bits(replaced.state_dict(), other.state_dict())


def test_confidence_is_added_and_all_else_stays_until_there_is_another_head(tmp_path: Path):
    path = save(tmp_path / "last.safetensors", wer=0.25)
    add_ctc(path, CtcHead(WIDTH, CtcSpec("ab", hidden=8, kernel=3)))
    before = load_trained(path)
    assert before.confidence is None
    add_confidence(path, {"bias": 0.5, "logprob": 1e-7})
    after = load_trained(path)
    assert after.confidence == {"bias": 0.5, "logprob": 1e-7}
    assert_same_bits(after.named_tensors(), before.named_tensors())
    assert (after.parts, after.trained_on, after.metrics) == (before.parts, before.trained_on, before.metrics)
    found, wanted = after.ctc_head(), before.ctc_head()
    assert found is not None and wanted is not None and found.spec == wanted.spec
    assert_same_bits(found.state_dict(), wanted.state_dict())
    add_ctc(path, CtcHead(WIDTH, CtcSpec("x", hidden=4)))
    assert load_trained(path).confidence is None  # it was made with the other head


def test_a_head_that_is_there_already_leaves_the_file_alone(tmp_path: Path):
    path, head = save(tmp_path / "last.safetensors"), CtcHead(WIDTH, CtcSpec("ab", hidden=4))
    add_ctc(path, head)
    add_confidence(path, {"bias": 1.0})
    add_ctc(path, head)
    assert load_trained(path).confidence == {"bias": 1.0}
    add_ctc(path, CtcHead(WIDTH, CtcSpec("ab", hidden=4)))
    assert load_trained(path).confidence is None


def test_a_damaged_ctc_head_is_an_error(tmp_path: Path):
    path = save(tmp_path / "last.safetensors")
    add_ctc(path, CtcHead(WIDTH, CtcSpec("ab", hidden=4)))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for name in ("ctc.out.bias", "ctc.conv1.weight"):
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, tmp_path / "damaged.safetensors", metadata)
        with pytest.raises(UserError, match="its CTC head is damaged .* 2 characters; train it again with --ctc 1"):
            load_trained(tmp_path / "damaged.safetensors").ctc_head()
        add_ctc(tmp_path / "damaged.safetensors", CtcHead(WIDTH, CtcSpec("ab", hidden=4)))  # as that remedy does
        assert load_trained(tmp_path / "damaged.safetensors").ctc_head()
