"""State files: what they hold, what they fit, and BlinkDL's loader as the oracle of the published layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import random_rwkv6_tensors

from rwkv_speech.__main__ import main
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.states import read_states


@pytest.fixture(scope="module")
def model(tiny_parts: Parts) -> SpeechLM:
    torch.manual_seed(1)
    model = SpeechLM.build(tiny_parts, task_names=["asr", "st_es"])
    for number, state in enumerate(model.initial_states.values(), start=1):
        torch.nn.init.normal_(state, number, 1.0)
    return model.eval()


@pytest.fixture
def run(model: SpeechLM, tmp_path: Path) -> Path:
    model.save(tmp_path / "run/best.safetensors", wer=0.5)
    return tmp_path / "run"


def states(*words: object) -> int:
    return main(["states", *map(str, words)])


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert states(*words) == 2
    return capsys.readouterr().err


def test_a_state_is_copied_out_of_a_run_and_into_another_checkpoint_to_the_bit(
    model: SpeechLM, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "es.safetensors"
    assert states("copy", run, file, "--tasks", "st_es") == 0
    assert file.stat().st_size < model.initial_states["st_es"].numel() * 4 + 1000
    before = load_trained(run / "best.safetensors")
    assert states("add", file, run, "--name", "st_es_2") == 0
    assert f"written to {run / 'best.safetensors'}" in capsys.readouterr().out
    after = load_trained(run / "best.safetensors")
    assert set(after.initial_states) == {"asr", "st_es", "st_es_2"} and after.metrics == before.metrics
    tensors, old = after.named_tensors(), before.named_tensors()
    assert all(torch.equal(tensors[name], x) for name, x in old.items())
    assert torch.equal(after.initial_states["st_es_2"], model.initial_states["st_es"])
    assert states("remove", run, "--tasks", "st_es_2") == 0
    assert set(load_trained(run / "best.safetensors").initial_states) == {"asr", "st_es"}


def test_list_shows_names_and_what_they_belong_to(model: SpeechLM, run: Path, capsys: pytest.CaptureFixture[str]):
    assert states("list", run) == 0
    shown = capsys.readouterr().out
    assert "st_es" in shown and "bleu" in shown and "asr" in shown and "wer" in shown and "written" not in shown
    assert model.parts.base_sha256[:12] in shown and model.adapter_sha256[:12] in shown


def test_average_and_interpolate_are_what_they_say(model: SpeechLM, run: Path, tmp_path: Path):
    asr, st = (model.initial_states[name].detach().double().numpy() for name in ("asr", "st_es"))
    assert states("average", run, tmp_path / "mean.safetensors", "--name", "both") == 0
    command = ["interpolate", run, tmp_path / "mix.safetensors", "--name", "mix", "--weight", "0.3"]
    assert states(*command, "--tasks", "st_es,asr") == 0
    for name, file, expected in (("both", "mean", (asr + st) / 2), ("mix", "mix", 0.7 * st + 0.3 * asr)):
        found = read_states(tmp_path / f"{file}.safetensors").states[name].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    files = f"{tmp_path / 'mean.safetensors'},{tmp_path / 'mix.safetensors'}"
    assert states("copy", files, tmp_path / "two.safetensors") == 0
    assert set(read_states(tmp_path / "two.safetensors").states) == {"both", "mix"}


def test_states_of_another_base_model_or_adapter_are_refused(
    model: SpeechLM, run: Path, tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(2)
    other = SpeechLM.build(tiny_parts)
    other.save(tmp_path / "other/best.safetensors")
    shown = error(capsys, "add", run, tmp_path / "other", "--tasks", "st_es")
    assert f"{run / 'best.safetensors'}: its states were learned with the adapter of SHA-256" in shown
    assert model.adapter_sha256[:12] in shown and other.adapter_sha256[:12] in shown
    with pytest.raises(UserError, match="with the adapter of SHA-256"):
        other.add_states(run)
    torch.save(random_rwkv6_tensors(seed=9), tmp_path / "base.pth")
    elsewhere = SpeechLM.build(replace(tiny_parts, load_model=str(tmp_path / "base.pth")))
    elsewhere.adapter.load_state_dict(model.adapter.state_dict())
    with pytest.raises(UserError, match="with the base model of SHA-256"):
        elsewhere.add_states(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["copy", "{run}", "{here}/x.safetensors", "--tasks", "qa"], "no state named 'qa', expected one of asr, st_es"),
        (["copy", "{run}", "{here}/x.bin"], "x.bin: found .bin, expected the name of a .safetensors or .pth file"),
        (["copy", "{run}", "{here}/x.pth"], "x.pth: found 2 states (asr, st_es), expected one"),
        (["copy", "{run}", "{run}/best.safetensors"], "is there already, expected a new file"),
        (["copy", "{run}", "{here}/x.safetensors", "--name", "one"], "--name: found 2 states"),
        (["copy", "{run}", "{here}/x.safetensors", "--name", "A", "--tasks", "asr"], "task 'A': expected a name"),
        (["add", "{run}", "{run}"], "has a state named 'asr' already"),
        (["remove", "{run}", "--tasks", "asr,st_es"], "expected --tasks to leave at least one"),
        (["interpolate", "{run}", "x.safetensors", "--name", "m", "--weight", "1", "--tasks", "asr"], "expected two"),
        (["list", "{here}/gone"], "found no trained weights there"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert message in error(capsys, *(word.format(run=run, here=tmp_path) for word in words))


def test_states_of_a_text_run_fit_any_adapter_and_what_they_join_stays_bound(
    run: Path, tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reader = SpeechLM.build(tiny_parts, task_names=["qa"], hears=False)
    reader.save(tmp_path / "text/best.safetensors")
    torch.manual_seed(2)
    SpeechLM.build(tiny_parts, task_names=["topic"]).save(tmp_path / "other/best.safetensors")
    both = tmp_path / "both.safetensors"
    assert states("copy", f"{tmp_path / 'text'},{run}", both) == 0
    assert set(read_states(both).states) == {"asr", "qa", "st_es"}
    assert read_states(both).adapter_sha256 == read_states(run).adapter_sha256
    assert "with the adapter of SHA-256" in error(capsys, "add", both, tmp_path / "other", "--tasks", "asr")
    assert "with the adapter of" in error(capsys, "copy", f"{tmp_path / 'text'},{run},{tmp_path / 'other'}", "x")
    assert "has no adapter" in error(capsys, "add", run, tmp_path / "text")
    assert states("add", tmp_path / "text", run) == 0
    assert set(load_trained(run / "best.safetensors").initial_states) == {"asr", "qa", "st_es"}


def test_a_file_of_states_serves_beside_those_of_the_weights(model: SpeechLM, run: Path, tmp_path: Path):
    assert states("copy", run, tmp_path / "es.safetensors", "--tasks", "st_es", "--name", "mine") == 0
    loaded = SpeechLM.from_pretrained(run)
    assert (loaded.add_states(tmp_path / "es.safetensors"), loaded.add_states(run), loaded.add_states("")) == (
        "mine",
        "",
        "",
    )
    assert torch.equal(loaded.initial_states["mine"], model.initial_states["st_es"])


def test_a_soft_prompt_goes_with_its_state(model: SpeechLM, tiny_parts: Parts, tmp_path: Path):
    prompted = SpeechLM.build(tiny_parts, task_names=["asr", "a", "b"])
    prompted.add_soft_prompts(["a", "b"], 2)
    prompted.save(tmp_path / "run/best.safetensors")
    assert states("copy", tmp_path / "run", tmp_path / "a.safetensors", "--tasks", "a", "--name", "c") == 0
    assert states("add", tmp_path / "a.safetensors", tmp_path / "run") == 0
    found = load_trained(tmp_path / "run/best.safetensors").soft_prompts
    assert set(found) == {"a", "b", "c"} and torch.equal(found["c"], prompted.soft_prompts["a"])
    mix = ["interpolate", tmp_path / "run", tmp_path / "mix.safetensors", "--name", "mix", "--weight", "0.25"]
    assert states(*mix, "--tasks", "a,asr") == 2  # one has a soft prompt, the other has none
    assert states(*mix, "--tasks", "a,b") == 0
    expected = 0.75 * prompted.soft_prompts["a"] + 0.25 * prompted.soft_prompts["b"]
    torch.testing.assert_close(read_states(tmp_path / "mix.safetensors").soft_prompts["mix"], expected.detach())
    loaded = SpeechLM.from_pretrained(tmp_path / "run")
    loaded.add_states(tmp_path / "mix.safetensors")
    torch.testing.assert_close(loaded.soft_prompts["mix"].detach(), expected.detach())


def test_published_states_are_what_blinkdls_loader_makes_of_them(
    model: SpeechLM, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The model from an exported state against pip's `rwkv` from the same file, read as its author reads such files."""
    assert states("copy", run, tmp_path / "es.pth", "--tasks", "st_es") == 0
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    theirs: Any = pytest.importorskip("rwkv.model").RWKV(
        model.parts.load_model.removesuffix(".pth"), "cpu fp32", verbose=False
    )
    raw = torch.load(tmp_path / "es.pth", weights_only=True)
    state = []
    for i in range(model.lm.sizes.n_layer):  # as in RWKV_v6_demo.py
        zero = torch.zeros(model.lm.sizes.C)
        state += [zero, raw[f"blocks.{i}.att.time_state"].transpose(1, 2).float().contiguous(), zero]
    ids = [5, 17, 200, 3]
    expected, _ = theirs.forward(ids, state)
    ours: RWKV6 = model.lm
    with torch.no_grad():
        found = ours(torch.tensor([ids]), state=model.initial_state(["st_es"])).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        without = ours(torch.tensor([ids])).logits[0, -1]
    assert (found - without).abs().max() > 0.1  # else the state would not matter
    assert states("add", tmp_path / "es.pth", run, "--name", "back") == 0
    assert torch.equal(load_trained(run / "best.safetensors").initial_states["back"], model.initial_states["st_es"])


def test_that_a_task_transcribes_first_goes_with_its_state(
    tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = SpeechLM.build(tiny_parts, task_names=["asr", "qa", "st"])
    model.transcribe_first(["qa", "st"])
    model.save(tmp_path / "run/best.safetensors")
    run, file = tmp_path / "run", tmp_path / "qa.safetensors"
    assert states("copy", run, file, "--tasks", "qa", "--name", "mine") == 0
    assert read_states(file).transcribes == {"mine"}
    assert states("add", file, run) == 0
    loaded = SpeechLM.from_pretrained(run)
    assert loaded.parts.transcribes == ("mine", "qa", "st")
    assert (loaded.separator_of("mine"), loaded.separator_of("asr")) == (loaded.separator_id, None)
    assert states("list", run) == 0 and capsys.readouterr().out.count("transcribes first") == 3
    assert states("remove", run, "--tasks", "st") == 0
    assert SpeechLM.from_pretrained(run).parts.transcribes == ("mine", "qa")
    assert states("copy", f"{file},{run}", tmp_path / "x.safetensors", "--tasks", "mine") == 2  # in both
    # States that are taken over say how they are for themselves.
    other = SpeechLM.build(tiny_parts, task_names=["mine", "asr"])
    other.load_state_dict(other.state_dict() | {f"adapter.{x}": y for x, y in loaded.adapter.state_dict().items()})
    other.add_states(file)
    assert other.parts.transcribes == ("mine",)
    mix = ["interpolate", run, tmp_path / "mix.safetensors", "--name", "mix", "--weight", "0.5", "--tasks"]
    assert "qa first says what it heard, others of asr, qa do not" in error(capsys, *mix, "asr,qa")
    assert states(*mix, "mine,qa") == 0 and read_states(tmp_path / "mix.safetensors").transcribes == {"mix"}
    assert states("average", run, tmp_path / "mean.safetensors", "--name", "m", "--tasks", "mine,qa") == 0
    assert read_states(tmp_path / "mean.safetensors").transcribes == {"m"}
    assert "--transcribe_first" in error(capsys, "copy", file, tmp_path / "qa.pth")
    assert main(["export", str(run), str(tmp_path / "run.pth"), "--task", "qa"]) == 2
    assert "state qa first says what it heard" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "run.pth"), "--task", "asr"]) == 0
