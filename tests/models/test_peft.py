"""What is trained of a language model, against a base model into whose tensors it was written by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from safetensors.torch import save_file
from speech_models import LENGTHS, TEXTS, batch_of, build, sounds
from tiny_models import RANDOM_TENSORS
from torch import Tensor

from rwkv_speech.__main__ import main
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import open_base
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.families import read_lm
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.peft import LoraSpec, load_updates, settle, tune, tuned
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.rwkv7 import RWKV7
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.states import read_states

TARGETS = {
    "x060": "receptance,key,value,output,gate,ffn.key,ffn.receptance",
    "x070": "receptance,key,value,output,ffn.key",
}
IDS = torch.randint(272, (3, 9), generator=torch.Generator().manual_seed(4))


def changed(lm: RWKV, train_parts: str = "ln,time") -> RWKV:
    """With trained parts that matter."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, x in tuned(lm, train_parts).items():
            x.add_(torch.randn_like(x), alpha=0.3 if ".lora_" in name else 0.05)
    return lm


def written_out(tensors: dict[str, Tensor], lm: RWKV, scale: float, train_parts: str = "ln,time") -> dict[str, Tensor]:
    """A base model with the same changes."""
    found = {name: x.detach() for name, x in tuned(lm, train_parts).items()}
    out = {name: x.clone() for name, x in tensors.items()}
    for name, x in found.items():
        if name.endswith("lora_A"):
            stem = name.removesuffix("lora_A")
            out[stem + "weight"] += scale * found[stem + "lora_B"] @ x
        elif not name.endswith("lora_B"):
            out[name] = x
    return out


@pytest.fixture(params=RANDOM_TENSORS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RWKV, RWKV]:
    """A tuned model of a family, and what it should be."""
    tensors = RANDOM_TENSORS[request.param]()
    torch.save(tensors, tmp_path / "base.pth")
    lm = read_lm(tmp_path / "base.pth")
    tune(lm, LoraSpec(4, 6.0, TARGETS[request.param]), "ln,time")
    changed(lm)
    torch.save(written_out(tensors, lm, 1.5), tmp_path / "plain.pth")
    return lm, read_lm(tmp_path / "plain.pth")


def outputs(lm: RWKV) -> dict[str, Tensor]:
    """By all the ways through a model."""
    cu_seqlens, slots = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 0, 2])
    state, other = lm.zero_state(3), lm.zero_state(3)
    return {
        "logits": lm(IDS).logits.detach(),
        "packed": lm(IDS[:1], cu_seqlens=cu_seqlens).logits.detach(),
        "steps": torch.stack([lm.step(column, state) for column in IDS.T]),
        "slots": lm.step(IDS[0, :3], other, slots),
        **{f"state {i}": x for i, x in enumerate((*state, *other))},
    }


def test_every_way_through_the_model_has_the_changes(pair: tuple[RWKV, RWKV]):
    lm, plain = pair
    for settled in (False, True):
        if settled:
            settle(lm, "ln,time")
            assert {name for name, _ in lm.named_parameters()} == {name for name, _ in plain.named_parameters()}
            lm._prepared = (None, None)
            assert lm.slots_are_apart == plain.slots_are_apart  # the native step serves again, if there is one
        else:
            assert not lm.slots_are_apart
        for (name, x), y in zip(outputs(lm).items(), outputs(plain).values(), strict=True):
            assert_rms_close(name, x, y, 2e-5)


def test_gradients_are_those_of_the_matrix(pair: tuple[RWKV, RWKV]):
    """That of B A follows from the matrix's own: d B = s dW A^T, d A = s B^T dW."""
    lm, plain = pair
    plain.requires_grad_(True)
    targets = torch.randint(272, (27,), generator=torch.Generator().manual_seed(6))
    for model in (lm, plain):
        logits = model(IDS).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    exact = dict(plain.named_parameters())
    found = tuned(lm, "ln,time")
    for name, x in found.items():
        stem, _, leaf = name.rpartition(".")
        if leaf.startswith("lora_"):
            dW, A, B = (
                t.double() for t in (exact[stem + ".weight"].grad, found[stem + ".lora_A"], found[stem + ".lora_B"])
            )
            want = 1.5 * (B.T @ dW if leaf == "lora_A" else dW @ A.T)
        else:
            want = exact[name].grad
        assert x.grad is not None and want.abs().max() > 0, name
        assert_rms_close(name, x.grad, want, 1e-4)
    assert all(x.grad is None for name, x in lm.named_parameters() if name not in found)


def test_parts_are_those_that_their_names_say():
    names = {}
    for family, make in RANDOM_TENSORS.items():
        lm = read_lm_of(make())
        names[family] = {part: set(tuned(lm, part)) for part in ("ln", "time")}
    six, seven = names["x060"], names["x070"]
    assert six["time"] == {name for name in RANDOM_TENSORS["x060"]() if "time_" in name}
    for found in names.values():
        assert {name.split(".")[-2] for name in found["ln"]} == {"ln0", "ln1", "ln2", "ln_x", "ln_out"}
    assert {name.split(".")[-1] for name in seven["time"]} >= {"x_r", "w0", "w1", "a2", "v0", "g1", "k_k", "r_k", "x_k"}
    assert not any(name.endswith(".weight") for found in names.values() for name in found["time"])


def read_lm_of(tensors: dict[str, Tensor]) -> RWKV:
    return (RWKV6 if "blocks.0.att.time_maa_w1" in tensors else RWKV7).from_tensors(tensors, "random")


def test_a_target_of_another_family_is_named():
    with pytest.raises(UserError, match="--lora_targets: found gate, which an RWKV-7 .* has not"):
        tune(read_lm_of(RANDOM_TENSORS["x070"]()), LoraSpec(4, 8.0, "key,gate"), "")


@pytest.mark.parametrize("layout", ["own", "peft"])
def test_published_updates_are_taken_over(layout: str, tmp_path: Path):
    """RWKV-PEFT's files hold norms, too; peft's a prefix, .weight, and a folder with the numbers."""
    spec, parts = LoraSpec(4, 6.0, "key,ffn.key"), "ln" if layout == "own" else ""
    source, lm = (read_lm_of(RANDOM_TENSORS["x060"]()) for _ in range(2))
    for model in (source, lm):
        tune(model, spec, parts)
    tensors = {name: x.detach().clone() for name, x in tuned(changed(source, parts), parts).items()}
    path = tmp_path / "rwkv-0.pth"
    if layout == "own":
        torch.save(tensors, path)
    else:
        path = tmp_path
        save_file(
            {f"base_model.model.{name}.weight": x for name, x in tensors.items()}, path / "adapter_model.safetensors"
        )
        (path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "peft_type": "LORA"}))
    load_updates(lm, path, spec, parts)
    assert_rms_close("logits", lm(IDS).logits, source(IDS).logits, 1e-7)
    other = read_lm_of(RANDOM_TENSORS["x060"]())
    tune(other, LoraSpec(4, 6.0, "key"), parts)
    with pytest.raises(
        UserError, match="do not fit --lora_rank 4 --lora_targets key.*\n *unknown blocks.0.ffn.key.lora_A"
    ):
        load_updates(other, path, LoraSpec(4, 6.0, "key"), parts)
    if layout == "peft":
        with pytest.raises(UserError, match="--lora_alpha: found 8, but .* has 6; give --lora_alpha 6"):
            load_updates(lm, path, replace(spec, alpha=8.0), parts)
        (path / "adapter_config.json").unlink()
        with pytest.raises(UserError, match="--lora_from: .*adapter_config.json cannot be read"):
            load_updates(lm, path, spec, parts)


@pytest.fixture
def model(tiny_parts: Parts) -> SpeechLM:
    found = build(replace(tiny_parts, lora=LoraSpec(4, 6.0, "key,value", 0.1), train_parts="ln"))
    changed(found.lm, "ln")
    return found.eval()


@torch.no_grad()
def logits_of(model: SpeechLM) -> Tensor:
    audio, lengths = model.audio_tokens(batch_of(model, sounds(LENGTHS), TEXTS))
    state = model.initial_state(["asr"] * len(lengths))
    return model.prefill(audio, [model.prefix(n, "asr") for n in lengths.tolist()], state)[0]


def test_a_checkpoint_holds_the_changes_and_its_states_are_bound_to_them(
    model: SpeechLM, tmp_path: Path, tiny_parts: Parts, capsys: pytest.CaptureFixture[str]
):
    model.save(tmp_path / "run/best.safetensors")
    again = SpeechLM.from_pretrained(tmp_path / "run")
    assert not any("lora" in name for name, _ in again.named_parameters())
    assert_rms_close("logits", logits_of(again), logits_of(model), 2e-5)
    known = {model.adapter_sha256, again.adapter_sha256, read_states(tmp_path / "run").adapter_sha256}
    plain = build(tiny_parts)
    plain.adapter.load_state_dict(model.adapter.state_dict())
    assert len(known) == 1 and plain.adapter_sha256 not in known
    trained = load_trained(tmp_path / "run/best.safetensors")
    assert set(trained.lm) == set(model.tuned) and trained.parts is not None and trained.parts.lora == model.parts.lora
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "a.pth")]) == 2
    assert "python -m rwkv_speech merge" in capsys.readouterr().err
    for parts in (
        tiny_parts,
        replace(model.parts, lora=LoraSpec(4, 8.0, "key,value")),
        replace(model.parts, train_parts=""),
    ):
        with pytest.raises(UserError, match="best.safetensors: was trained with --(peft lora|train_parts)"):
            SpeechLM.build(parts).load_trained(trained)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_a_packed_model_is_decoded_as_it_was_trained(quant: str, tiny_parts: Parts, tmp_path: Path):
    model = build(replace(tiny_parts, quant=quant, lora=LoraSpec(4, 6.0, "key,value")))
    changed(model.lm, "")
    model.save(tmp_path / "run/best.safetensors")
    again = SpeechLM.from_pretrained(tmp_path / "run")
    assert again.parts.quant == quant
    assert_rms_close("logits", logits_of(again), logits_of(model), 2e-5)
    for given in ("", "nf4" if quant == "int8" else "int8"):
        with pytest.raises(UserError, match=f"--precision: found .* was trained with {quant}, expected the same"):
            SpeechLM.from_pretrained(tmp_path / "run", Parts(quant=given))


def test_other_rounding_than_in_training_is_said(tiny_parts: Parts, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    build(tiny_parts).save(tmp_path / "best.safetensors")
    SpeechLM.from_pretrained(tmp_path, Parts(quant="nf4"))
    assert "was trained with the language model in floats, which is here in nf4" in caplog.text


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_merged_run_is_the_run(quant: str, tiny_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = build(replace(tiny_parts, quant=quant, lora=LoraSpec(4, 6.0, "key,value"), train_parts="ln,time"))
    changed(model.lm)
    model.save(tmp_path / "run/best.safetensors", wer=0.25)
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    assert f"written to {tmp_path / 'merged'}" in capsys.readouterr().out
    merged = SpeechLM.from_pretrained(tmp_path / "merged")
    assert_rms_close("logits", logits_of(merged), logits_of(model), 2e-5)
    assert merged.parts.lora is None and not merged.parts.train_parts and not merged.parts.quant
    assert merged.metrics == {"wer": 0.25}
    family, tensors = open_base(tmp_path / "merged/base.pth")
    before = open_base(tiny_parts.load_model)[1]
    assert family == "x060" and {n: (x.shape, x.dtype) for n, x in tensors.items()} == {
        n: (x.shape, x.dtype) for n, x in before.items()
    }
    same = {name for name, x in tensors.items() if torch.equal(x, before[name])}
    if not quant:
        assert "emb.weight" in same and "blocks.0.att.output.weight" in same
    assert not any(name.endswith(("ln1.weight", "att.key.weight", "time_decay")) for name in same)
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 2
    assert "is there already, expected a new folder" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "twice")]) == 2
    assert "nothing was trained of its language model" in capsys.readouterr().err
