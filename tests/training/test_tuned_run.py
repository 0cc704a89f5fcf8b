"""Runs that train some of the language model, too: resumed to the bit, scored as they were validated, carried on."""

from pathlib import Path

import eval as eval_script
import pytest
import torch
import train as train_script
from run_files import column, command_line, finish, random_base, results, tiny_run
from safetensors.torch import load_file
from tiny_models import random_rwkv7_tensors

from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.synthetic.make_corpus import Flags, make_corpus

LORA = {"peft": "lora", "lora_rank": 4, "lora_dropout": 0.2, "lora_targets": "key,value", "train_parts": "ln,time"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six utterances, and beside them a random RWKV-7 with the embedded vocabulary."""
    folder = tmp_path_factory.mktemp("tuned")
    make_corpus(Flags(str(folder), seed=3, train=4, valid=2, test=1))
    random_base(folder / "rwkv7.pth", random_rwkv7_tensors, C=64, ffn=256)
    return folder


def arguments(corpus: Path, run: Path, **more: object) -> list[str]:
    values = {"micro_bsz": 2, "epoch_count": 2, "lr_adapter": 1e-3, "lr_lm": 1e-3, **LORA, **more}
    return tiny_run(corpus, run, **values)


RWKV7 = {"encoder": "tiny", "vocab_file": "tiny", "stack": 3, "adapter_hidden": 16}


@pytest.mark.parametrize(("family", "precision"), [("x060", "int8"), ("x070", "nf4")])
def test_a_tuned_and_packed_run_is_resumed_to_the_bit(corpus: Path, tmp_path: Path, family: str, precision: str):
    flags = {"precision": precision, "encoder_precision": precision, "grad_cp": int(family == "x070")}
    if family == "x070":
        flags |= {"load_model": corpus / "rwkv7.pth", **RWKV7}
    finish(arguments(corpus, tmp_path / "whole", **flags))
    for count in (1, 2):
        finish(arguments(corpus, tmp_path / "resumed", epoch_count=count, lr_schedule="constant", **flags))
    finish(arguments(corpus, tmp_path / "constant", lr_schedule="constant", **flags))
    assert results(tmp_path / "resumed") == results(tmp_path / "constant")
    trained = load_trained(tmp_path / "whole/last.safetensors")
    assert trained.parts is not None and trained.parts.quant == trained.parts.encoder_quant == precision
    updates = [x for name, x in trained.lm.items() if name.endswith("lora_B")]
    assert len(updates) >= 4 and all((x != 0).any() for x in updates)
    assert {x.dtype for x in trained.lm.values()} == {torch.float32}
    assert column(tmp_path / "whole", "lr_lm")[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("family", [{}, RWKV7], ids=["x060", "x070"])
def test_a_run_with_a_state_offset_is_resumed_to_the_bit_and_gets_more_states(
    corpus: Path, tmp_path: Path, family: dict[str, object]
):
    flags = {"micro_bsz": 2, "lr_schedule": "constant", **family}
    if family:
        flags["load_model"] = corpus / "rwkv7.pth"
    tuned = {"lr_adapter": 1e-3, "peft": "state_offset", "lr_lm": 1e-2, **flags}
    finish(tiny_run(corpus, tmp_path / "whole", epoch_count=2, **tuned))
    for count in (1, 2):
        finish(tiny_run(corpus, tmp_path / "resumed", epoch_count=count, **tuned))
    assert results(tmp_path / "resumed") == results(tmp_path / "whole")
    trained = load_trained(tmp_path / "whole/last.safetensors")
    assert trained.lm and all(name.endswith("att.state_offset") and (x != 0).any() for name, x in trained.lm.items())
    new = {"init_from": tmp_path / "whole", "freeze": "adapter", "task": "keyword", **flags}
    finish(tiny_run(corpus, tmp_path / "more", **new))
    after = load_trained(tmp_path / "more/last.safetensors")
    assert set(after.initial_states) == {"asr", "keyword"} and after.lm.keys() == trained.lm.keys()
    assert all(torch.equal(x, trained.lm[name]) for name, x in after.lm.items())


def test_bfloat16_beside_trained_norms_and_time_parameters(corpus: Path, tmp_path: Path):
    for family in ({}, {"load_model": corpus / "rwkv7.pth", **RWKV7}):
        run = tmp_path / f"run{len(family)}"
        given = {"precision": "bf16", "epoch_count": 1, "valid_data": corpus / "valid.jsonl", **family}
        finish(arguments(corpus, run, **given))
        assert all(x.isfinite().all() for x in load_file(run / "last.safetensors").values())


def test_a_tuned_run_is_scored_as_validated_and_gets_more_states(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, more = tmp_path / "run", tmp_path / "more"
    finish(arguments(corpus, run, valid_data=corpus / "valid.jsonl", lora_dropout=0.0))
    capsys.readouterr()
    argv = command_line(
        proj_dir=run, eval_data=corpus / "valid.jsonl", device="cpu", checkpoint=run / "last.safetensors"
    )
    assert eval_script.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"{100 * column(run, 'wer')[-1]:.2f}" in shown
    new = {"init_from": run, "freeze": "adapter", "task": "keyword", "peft": "none", "train_parts": ""}
    argv = arguments(corpus, more, **new)
    kept = [
        i for i in range(0, len(argv), 2) if not argv[i].startswith("--lora") and argv[i] != "--lr_lm" and argv[i + 1]
    ]
    finish([word for i in kept for word in argv[i : i + 2]])
    before, after = (load_trained(x / "best.safetensors" if x == run else x / "last.safetensors") for x in (run, more))
    assert set(after.initial_states) == {"asr", "keyword"} and after.lm.keys() == before.lm.keys()
    assert all(torch.equal(x, before.lm[name]) for name, x in after.lm.items())
    assert train_script.main(arguments(corpus, tmp_path / "other", init_from=run, lora_rank=8)) == 2
    assert "was trained with --peft lora --lora_rank 4" in capsys.readouterr().err
