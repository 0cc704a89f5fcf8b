"""The training step: its gradient however a batch is cut, what is frozen, number types, losses that are not finite."""

import json
from pathlib import Path
from typing import Any

import eval as eval_script
import pytest
import torch
import train as train_script
from assertions import assert_rms_close
from run_files import random_base, tiny_run
from safetensors.torch import load_file
from tiny_models import random_rwkv6_tensors

from rwkv_speech import tiny
from rwkv_speech.config import TrainConfig
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.sources import open_source
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM


def trained_step(corpus: Path, run: Path, **flags: object) -> dict[str, torch.Tensor]:
    """The weights after one optimizer step over all eight utterances."""
    assert train_script.main(tiny_run(corpus, run, grad_clip=0, lr_schedule="constant", **flags)) == 0
    return load_file(run / "last.safetensors")


@pytest.fixture(scope="module")
def plain_step(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after such a step with no other flags."""
    return trained_step(corpus, tmp_path_factory.mktemp("plain"), micro_bsz=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Flags of a random model, for comparisons of gradients: the embedded one magnifies rounding at the start."""
    return random_base(tmp_path_factory.mktemp("base") / "base.pth", random_rwkv6_tensors)


_HUGE_STEP = 1e6


def descend(monkeypatch: pytest.MonkeyPatch) -> None:
    """One huge step of plain gradient descent leaves the gradient itself in the weights."""
    from rwkv_speech.training import module as lightning_module

    def descent(adapter, state, *rates):
        groups = [{"params": list(adapter), "name": "adapter"}, {"params": list(state), "name": "state"}]
        return torch.optim.SGD(groups, lr=_HUGE_STEP)

    monkeypatch.setattr(lightning_module, "make_optimizer", descent)


@pytest.mark.parametrize("form", ["torch", "auto"])
def test_accumulation_does_not_change_the_gradient(
    corpus: Path, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    descend(monkeypatch)
    whole = trained_step(corpus, tmp_path / "whole", micro_bsz=8, wkv6=form, **base)
    parts = trained_step(corpus, tmp_path / "parts", micro_bsz=3, accumulate=3, wkv6=form, **base)
    for name, tensor in whole.items():
        assert float(tensor.abs().max()) > 10, f"{name}: gradient too small to be seen"
        # Other batch shapes round differently in the encoder, too, which the states' gradients magnify most.
        assert_rms_close(name, parts[name], tensor, 3e-4 if "initial_states" in name else 2e-5)
        assert float((parts[name] - tensor).abs().max()) <= 3e-5 * _HUGE_STEP, name


def test_kl_of_answers_and_cross_entropy_of_the_rest_in_one_run(
    corpus: Path,
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    descend(monkeypatch)
    lines = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line |= {"source_text": line.pop("text"), "answer": "yes"}
    (corpus / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    taught = {"train_data": corpus / "answers.jsonl", "loss": "kl", **base}
    whole = trained_step(corpus, tmp_path / "whole", micro_bsz=8, **taught)
    assert "4 of 8 lines looked at are learned by KL, the others by cross-entropy" in capsys.readouterr().out
    parts = trained_step(corpus, tmp_path / "parts", micro_bsz=3, accumulate=3, **taught)
    for name, tensor in whole.items():
        assert_rms_close(name, parts[name], tensor, 3e-4 if "initial_states" in name else 2e-5)
    assert train_script.main(tiny_run(corpus, tmp_path / "none", loss="kl")) == 2
    assert "none of 8 lines of --train_data has an answer and a source_text" in capsys.readouterr().err


def test_frozen_weights_stay_and_the_encoder_stays_in_eval_mode(corpus: Path, tmp_path: Path):
    from rwkv_speech.training.run import fit

    model = SpeechLM.build(Parts("tiny"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = TrainConfig(proj_dir=str(tmp_path), device="cpu", micro_bsz=4, workers=0, lr_adapter=1e-2, warmup_steps=1)
    fit(model, config, SpeechDataset(open_source(str(corpus / "train.jsonl")), model.tokenizer), None)
    assert not any(module.training for module in model.encoder.modules())
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {
        "initial_states.asr",
        *(f"adapter.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")),
    }


def test_bf16_trains_close_to_fp32_and_evaluates(corpus: Path, tmp_path: Path):
    exact = trained_step(corpus, tmp_path / "fp32", micro_bsz=8, lr_adapter=1e-3)
    rough = trained_step(corpus, tmp_path / "bf16", micro_bsz=8, lr_adapter=1e-3, precision="bf16")
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in rough.values())
    name = "initial_states.asr"
    assert torch.nn.functional.cosine_similarity(exact[name].flatten(), rough[name].flatten(), dim=0) > 0.7
    argv = ["--proj_dir", str(tmp_path / "bf16"), "--device", "cpu", "--precision", "bf16"]
    assert eval_script.main([*argv, "--eval_data", str(corpus / "test.jsonl")]) == 0


def test_grad_cp_gives_the_same_weights(corpus: Path, tmp_path: Path, plain_step: dict[str, torch.Tensor]):
    again = trained_step(corpus, tmp_path / "again", micro_bsz=8, grad_cp=1)
    assert all(torch.allclose(x, again[name], rtol=0, atol=1e-6) for name, x in plain_step.items())


def test_train_stops_at_a_loss_that_is_not_finite(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One bad utterance in the start weights: an infinite state."""
    model = SpeechLM.build(Parts("tiny"))
    with torch.no_grad():
        model.initial_states["asr"].fill_(torch.inf)
    model.save(tmp_path / "bad.safetensors")
    code = train_script.main(tiny_run(corpus, tmp_path / "run", init_from=tmp_path / "bad.safetensors"))
    message = capsys.readouterr().err
    assert code == 2 and "step 0: the loss is nan, expected a finite number" in message and "train/0000" in message
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_module_rejects_more_steps_than_data(corpus: Path, tmp_path: Path):
    from rwkv_speech.training.run import fit

    model = SpeechLM.build(Parts(tiny.NAME))
    config = TrainConfig(proj_dir=str(tmp_path), device="cpu", micro_bsz=8, workers=0, epoch_steps=2)
    with pytest.raises(UserError, match="make 1; leave it"):
        fit(model, config, SpeechDataset(open_source(str(corpus / "train.jsonl")), model.tokenizer), None)


def test_train_with_a_feature_cache_takes_the_same_steps(
    corpus: Path, tmp_path: Path, plain_step: dict[str, torch.Tensor]
):
    flags = {"feature_cache": tmp_path / "cache", "feature_dtype": "float32", "micro_bsz": 8}
    kept = trained_step(corpus, tmp_path / "kept", **flags)
    again = trained_step(corpus, tmp_path / "again", **flags)
    for name, x in plain_step.items():
        assert_rms_close(name, kept[name], x, 1e-4)
        assert torch.equal(again[name], kept[name])
    code = train_script.main(tiny_run(corpus, tmp_path / "both", speed="0.9,1.1", **flags))
    assert code == 2
