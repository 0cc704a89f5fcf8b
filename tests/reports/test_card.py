"""Runs that are shared: what is in the folder, what the card says, and what others get of it."""

import json
from pathlib import Path

import pytest
import soundfile as sf
import torch
from conftest import write_wavlm
from hub_server import running_hub
from huggingface_hub import ModelCard, constants
from tiny_models import random_rwkv6_tensors

from rwkv_speech import SpeechLM
from rwkv_speech.__main__ import main
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import export_published, load_trained
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts, TrainedOn
from rwkv_speech.reports.card import Sharing, push
from rwkv_speech.reports.record import LogRow, add_metrics, start_metrics, write_run

SHARING = Sharing("cc-by-4.0", "BlinkDL/rwkv-6-world")


@pytest.fixture(scope="module")
def run(tiny_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As training, calibration and evaluation leave one."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    model = SpeechLM.build(tiny_parts, task_names=["asr", "asr_fr", "st_es"])
    for x in model.trained_parameters():
        torch.nn.init.normal_(x)
    model.ctc = CtcHead(model.encoder.width, CtcSpec(" abc", hidden=8)).requires_grad_(False)
    model.trained_on = TrainedOn(1200, 34.5, 29.0)
    model.adapter.requires_grad_(False)
    model.confidence = {"bias": 0.5}
    made_of = {"averaged": [{"file": "/home/me/a.safetensors"}], "validation": "WER 3.10 %", "epoch": 3}
    model.save(run / "best.safetensors", **made_of)
    flags = {"train_data": "/home/me/set/train.jsonl,hf:me/speech:train", "valid_data": "/home/me/v.jsonl"}
    write_run(run, {**flags, "lr_adapter": 0.001, "proj_dir": "/home/me/run"}, "cpu")
    start_metrics(run)
    add_metrics(run, LogRow(step=30, epoch=3))
    tasks = {
        "asr": {"num_utterances": 240, "wer": 0.03456, "cer": 0.01},
        "st": {"num_utterances": 1100, "chrf": 55.125, "bleu": 20.0},
    }
    (run / "eval-best-test-123.json").write_text(json.dumps({"data": "/home/me/test.jsonl", "tasks": tasks}))
    (run / "eval-last-test-123.json").write_text(json.dumps({"data": "no", "tasks": {}}))
    return run


@pytest.fixture(scope="module")
def shared(run: Path) -> Path:
    push("me/run", run, SHARING, run / "shared")
    return run / "shared"


def test_a_shared_checkpoint_is_the_run_without_paths_of_its_machine(run: Path, shared: Path, tiny_parts: Parts):
    assert {path.name for path in shared.iterdir()} == {"best.safetensors", "README.md"}
    before, now = load_trained(run / "best.safetensors"), load_trained(shared / "best.safetensors")
    assert all(torch.equal(x, now.named_tensors()[name]) for name, x in before.named_tensors().items())
    assert now.ctc and before.ctc and all(torch.equal(x, now.ctc[1][name]) for name, x in before.ctc[1].items())
    assert now.trained_on == before.trained_on and now.confidence == {"bias": 0.5}
    assert now.parts and now.parts.load_model == "base.pth" and now.parts.encoder == "wavlm"
    assert now.metrics["averaged"] == [{"file": "a.safetensors"}]
    for path in shared.iterdir():
        assert (
            b"/home" not in path.read_bytes()
            and str(Path(tiny_parts.load_model).parent).encode() not in path.read_bytes()
        )


def test_the_hub_reads_the_card(shared: Path):
    card = ModelCard.load(shared / "README.md")
    front = card.data.to_dict()
    assert front["license"] == "cc-by-4.0" and front["base_model"] == ["BlinkDL/rwkv-6-world"]
    assert front["datasets"] == ["me/speech"] and front["language"] == ["es", "fr"]
    assert (
        front["metrics"] == ["bleu", "cer", "chrf", "wer"] and front["pipeline_tag"] == "automatic-speech-recognition"
    )
    results = {(x.task_type, x.dataset_name, x.metric_type): x.metric_value for x in card.data.eval_results or []}
    assert results == {
        ("automatic-speech-recognition", "test.jsonl", "wer"): 3.46,
        ("automatic-speech-recognition", "test.jsonl", "cer"): 1.0,
        ("translation", "test.jsonl", "chrf"): 55.12,
        ("translation", "test.jsonl", "bleu"): 20.0,
    }


def test_the_card_says_data_scores_plan_and_licences(run: Path, shared: Path, tiny_parts: Parts):
    text = ModelCard.load(shared / "README.md").text
    parts = load_trained(shared / "best.safetensors").parts
    assert parts
    for words in (
        "python -m rwkv_speech predict --checkpoint me/run --load_model base.pth --encoder FOLDER speech.wav",
        "States: `asr`, `asr_fr`, `st_es`. A CTC head",
        "Trained on `train.jsonl`, `hf:me/speech:train`;\nvalidated on `v.jsonl`.\n1,200 utterances, 34.5 h",
        "| `test.jsonl` | asr | 240 | wer | 3.46 % |", "| `test.jsonl` | st | 1,100 | chrf | 55.12 |",
        "| steps, epochs | 30, 3 |", "| `--lr_adapter` | 0.001 |",
        f"`{parts.base_sha256}`", f"`{parts.encoder_sha256}`", "The weights in here: `cc-by-4.0`.",
    ):  # fmt: skip
        assert words in text


def test_a_push_is_what_another_machine_predicts_with(
    run: Path, tiny_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    files = Parts(tiny_parts.load_model, tiny_parts.encoder, tiny_parts.vocab_file)
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        words = ["push", "me/run", "--proj_dir", str(run), "--license", "mit", "--endpoint", hub.address]
        assert main(words) == 0 and f"written to {hub.address}/me/run/commit/" in capsys.readouterr().out
        found = SpeechLM.from_pretrained("me/run", files, endpoint=hub.address)
    here = SpeechLM.from_pretrained(run)
    waveform = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(2))
    options = {"vad": "none", "temperature": 0.0, "no_speech_threshold": 1.0, "max_new_tokens": 8}
    for task in ("asr", "st_es"):
        assert found.transcribe(waveform, task=task, **options) == here.transcribe(waveform, task=task, **options)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the cache is enough now, for the command, too
    sf.write("a.wav", waveform.numpy(), 16_000, subtype="FLOAT")
    given = ["--load_model", files.load_model, "--encoder", files.encoder, "--vocab_file", files.vocab_file]
    said = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["predict", "--checkpoint", "me/run", *given, *said, "a.wav"]) == 0
    assert capsys.readouterr().out.strip() == here.transcribe(waveform, **options)[0].text.strip() != ""
    with pytest.raises(UserError, match="base.pth is neither there nor in .* of SHA-256 .* with --load_model"):
        SpeechLM.from_pretrained(str(next(tmp_path.rglob("best.safetensors"))))


def test_another_base_model_or_encoder_is_refused(shared: Path, tiny_parts: Parts, tmp_path: Path):
    torch.save(random_rwkv6_tensors(seed=1), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"best.safetensors: trained on a base model with SHA-256 .* --load_model"):
        SpeechLM.from_pretrained(shared, Parts(str(tmp_path / "other.pth"), tiny_parts.encoder, tiny_parts.vocab_file))
    other = write_wavlm(tmp_path / "wavlm")
    from transformers import WavLMModel

    model = WavLMModel.from_pretrained(other)
    with torch.no_grad():
        model.encoder.layers[0].attention.q_proj.weight[0, 0] += 1
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"best.safetensors: trained on an encoder with SHA-256 .* --encoder"):
        SpeechLM.from_pretrained(shared, Parts(tiny_parts.load_model, str(other), tiny_parts.vocab_file))


def test_what_cannot_be_shared_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="--folder: .* is there already, expected a new folder"):
        push("me/run", run, SHARING, tmp_path)
    with pytest.raises(UserError, match="found no trained weights there"):
        push("me/run", tmp_path, SHARING, tmp_path / "new")
    export_published(load_trained(run / "best.safetensors"), tmp_path / "a.pth", "asr")
    with pytest.raises(UserError, match=r"a.pth: a published file does not say .*expected a run of train.py"):
        push("me/run", tmp_path / "a.pth", SHARING, tmp_path / "new")
    assert main(["push", "me/run", "--proj_dir", str(run)]) == 2
    assert "required: --license" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (run / "eval-best-bad-1.json").write_text('{"tasks": {"asr": {"wer": 0.1}}}')
    with pytest.raises(UserError, match=r"eval-best-bad-1.json: not a result of eval.py"):
        push("me/run", run, SHARING, tmp_path / "new")
    (run / "eval-best-bad-1.json").unlink()
