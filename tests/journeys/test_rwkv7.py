"""The embedded RWKV-7 from training to prediction: planned, resumed to the bit, scored, one file read."""

from pathlib import Path

import eval as eval_script
import predict as predict_script
import pytest
import train as train_script
from run_files import command_line, finish, results, tiny_run

from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.synthetic.make_corpus import Flags, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training utterances and two others."""
    folder = tmp_path_factory.mktemp("rwkv7")
    make_corpus(Flags(str(folder), seed=3, train=4, valid=1, test=1))
    return folder


def arguments(corpus: Path, run: Path, **more: object) -> list[str]:
    values: dict[str, object] = {"load_model": "tiny7", "valid_data": corpus / "valid.jsonl", "micro_bsz": 2}
    values |= {"lr_adapter": 1e-3, "epoch_count": 2}
    return tiny_run(corpus, run, **values | more)


def test_rwkv7_is_planned_trained_resumed_scored_and_read_with(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_script.main([*arguments(corpus, whole), "--plan", "1"]) == 0
    assert "language model" in capsys.readouterr().out
    finish(arguments(corpus, whole))
    for count in (1, 2):
        finish(arguments(corpus, resumed, epoch_count=count))
    assert results(resumed) == results(whole)
    trained = load_trained(whole / "last.safetensors")
    assert all((state != 0).any() for state in trained.initial_states.values())
    assert trained.parts is not None
    assert (trained.parts.load_model, trained.parts.encoder, trained.parts.stack) == ("tiny7", "tiny", 3)
    capsys.readouterr()
    argv = command_line(proj_dir=whole, eval_data=corpus / "test.jsonl", device="cpu", max_new_tokens=4)
    assert eval_script.main(argv) == 0
    assert "WER" in capsys.readouterr().out
    speech = next((corpus / "test").glob("*.flac"))
    for beam in ("1", "3"):
        flags = command_line(proj_dir=whole, device="cpu", max_new_tokens=4, beam=beam)
        assert predict_script.main([*flags, str(speech)]) == 0
