"""The CTC head's stage of train.py, on the embedded default."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train as train_script
from safetensors.torch import load_file

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.timestamps import WordTimes
from rwkv_speech.errors import UserError
from rwkv_speech.flags import parse
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.synthetic.make_corpus import main as make_corpus
from rwkv_speech.training import ctc
from rwkv_speech.training.points import newest_point


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    assert make_corpus(["--out", str(folder), "--train", "8", "--valid", "1", "--test", "1", "--seed", "3"]) == 0
    return folder


def train(corpus: Path, run: Path, **flags: object) -> int:
    values = {
        "load_model": "tiny", "device": "cpu", "proj_dir": run, "train_data": corpus / "train.jsonl", "micro_bsz": 4,
        "workers": 0, "warmup_steps": 1, **flags,
    }  # fmt: skip
    return train_script.main([word for name, value in values.items() for word in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a CTC head."""
    run = tmp_path_factory.mktemp("run")
    assert train(corpus, run) == 0
    return run


@pytest.fixture(scope="module")
def headed(corpus: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, whose utterances its CTC head has learned by heart."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("headed") / "run")
    assert train(corpus, run, ctc=1, ctc_epochs=50) == 0
    return run


def test_a_finished_run_gets_a_head_and_keeps_its_weights(finished: Path, headed: Path):
    for name in ("last.safetensors", "epoch-1.safetensors"):
        before, after = load_trained(finished / name), load_trained(headed / name)
        assert all(torch.equal(x, after.named_tensors()[n]) for n, x in before.named_tensors().items())
        assert (before.parts, before.metrics, before.trained_on) == (after.parts, after.metrics, after.trained_on)
        assert before.ctc is None and after.ctc is not None and not after.ignored
    assert not (headed / ctc.FOLDER / "frames").exists()  # kept for the time of the stage


def test_the_head_hears_what_it_has_learned(corpus: Path, headed: Path):
    model, source = SpeechLM.from_pretrained(headed), open_source(str(corpus / "train.jsonl"))
    assert model.ctc is not None and model.ctc.spec.labels == "".join(
        sorted({c for i in range(8) for c in source.utterance(i).text})
    )
    texts = [source.utterance(i).text for i in range(8)]
    heard = [model.ctc.texts(*model.encoder(w[None], torch.tensor([len(w)]))) for w in map(source.load, range(8))]
    assert sum(found == [text] for found, text in zip(heard, texts, strict=True)) >= 6
    silence = torch.zeros(1, 32_000)
    assert model.ctc.texts(*model.encoder(silence, torch.tensor([32_000]))) == [""]


def test_word_times_follow_a_pause(corpus: Path, headed: Path):
    """Two recordings with silence between: the second one's first word starts where it was put."""
    model, source = SpeechLM.from_pretrained(headed), open_source(str(corpus / "train.jsonl"))
    assert model.ctc is not None
    times, errors = WordTimes(model.ctc, model.encoder), []
    for first, second in itertools.pairwise(range(8)):
        silence = torch.zeros(1_600 * (2 + first))
        waveform = torch.cat([source.load(first), silence, source.load(second)])
        text = f"{source.utterance(first).text} {source.utterance(second).text}"
        log_probs = model.ctc(*model.encoder(waveform[None], torch.tensor([len(waveform)])))[0]
        words = times.words(text, log_probs, 0.0, len(waveform) / 16_000)
        put = (len(source.load(first)) + len(silence)) / 16_000
        errors.append(abs(words[len(source.utterance(first).text.split())].start - put))
    assert np.median(errors) < 0.06


def head_of(run: Path) -> dict[str, torch.Tensor]:
    return {name: x for name, x in load_file(run / "last.safetensors").items() if name.startswith("ctc.")}


def test_a_resumed_stage_and_another_start_give_the_same_head(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = [shutil.copytree(finished, tmp_path / name) for name in ("whole", "killed")]
    assert train(corpus, runs[0], ctc=1, ctc_epochs=3) == 0
    report = ctc.CtcModule._report

    def killed(module: ctc.CtcModule, *args: Any) -> None:
        report(module, *args)
        if module.current_epoch == 1:
            raise RuntimeError("killed")

    monkeypatch.setattr(ctc.CtcModule, "_report", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(corpus, runs[1], ctc=1, ctc_epochs=3)
    monkeypatch.undo()
    point = newest_point(runs[1] / ctc.FOLDER)
    assert point is not None and point.info["epoch"] == 1 and not head_of(runs[1])
    assert train(corpus, runs[1], ctc=1, ctc_epochs=3) == 0
    one, two = map(head_of, runs)
    assert len(one) == 10 and all(torch.equal(x, two[name]) for name, x in one.items())


def test_a_head_that_is_there_is_not_trained_again(
    corpus: Path, headed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = shutil.copytree(headed, tmp_path / "run")
    monkeypatch.setattr(ctc, "_fit", None)
    expected = head_of(run)
    shutil.copy(run / "last.safetensors", run / "epoch-7.safetensors")
    assert train(corpus, run, ctc=1, ctc_epochs=50, micro_bsz=2) == 0
    assert "in 3 checkpoints" in capsys.readouterr().out
    assert all(torch.equal(x, head_of(run)[name]) for name, x in expected.items())


def test_other_settings_train_another_head(
    corpus: Path, headed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = shutil.copytree(headed, tmp_path / "run")
    assert train(corpus, run, ctc=1, ctc_epochs=1, feature_cache=tmp_path / "cache") == 0
    assert "trained with other settings: it is trained again" in capsys.readouterr().out
    assert any(not torch.equal(x, head_of(run)[name]) for name, x in head_of(headed).items())
    assert list((tmp_path / "cache").glob("*/*.safetensors"))


def test_ctc_loss_is_the_sum_over_all_paths():
    draw = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 4, 5, generator=draw).log_softmax(-1)
    targets, lengths = [[4, 2], []], torch.tensor([4, 3])

    def read(path: tuple[int, ...]) -> list[int]:
        return [label for label, _ in itertools.groupby(path) if label]

    expected = [
        -np.log(sum(np.exp(sum(rows[t, label].item() for t, label in enumerate(path)))
                    for path in itertools.product(range(5), repeat=int(length)) if read(path) == target))
        for rows, length, target in zip(log_probs, lengths, targets, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(ctc.ctc_losses(log_probs, lengths, targets), torch.tensor(expected).float())
    needed = [ctc.frames_needed(target) for target in ([1, 1, 2, 2, 1], [1, 2], [])]
    assert needed == [7, 2, 0] and ctc.ctc_losses(log_probs, lengths, [[1, 1, 2, 2, 1], [1]])[0] == 0


def test_gaps_hold_the_mean_of_what_is_heard():
    torch.manual_seed(0)
    frames, lengths = torch.randn(40, 600, 3, dtype=torch.float64), torch.full((40,), 600)
    lengths[1], frames[1, 50:] = 50, torch.nan
    found = ctc.with_gaps(frames, lengths)
    gaps = (found != frames).all(-1) & (torch.arange(600) < lengths[:, None])
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(
            found[row][gaps[row]], frames[row, :length].mean(0).expand(int(gaps[row].sum()), 3), rtol=1e-5, atol=1e-6
        )
    # Of gaps that begin every 60 frames and last 1 to 8: 1 - the product of the odds that none covers a frame.
    assert abs(gaps[2:].double().mean() - (1 - math.prod(1 - (9 - n) / 8 / 60 for n in range(1, 9)))) < 0.01


def test_flags_that_a_head_cannot_be_trained_with():
    for words, said in (
        (["--ctc", "1", "--strategy", "deepspeed_stage_3"], "shares out the frozen encoder; .* --strategy ddp"),
        (["--ctc", "1", "--train_data", "hf-stream:x:y"], "arrives row by row"),
        (["--ctc_epochs", "2"], "without --ctc"),
    ):
        with pytest.raises(UserError, match=said):
            parse(TrainConfig, words, "")
