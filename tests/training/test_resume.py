"""Going on after an interruption: points on the disk, and runs that end as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train as train_script
from run_files import SAID_TO_END, column, command_line, finish, results, start, wait_for_a_point
from safetensors.torch import load_file

from rwkv_speech import tiny
from rwkv_speech.models.checkpoint import load_trained
from rwkv_speech.synthetic.make_corpus import Flags, make_corpus
from rwkv_speech.training.points import begin_point, finish_point, newest_point


def write_point(folder: Path, step: int, content: bytes = b"weights") -> Path:
    pending = begin_point(folder, step)
    (pending / "part").mkdir()
    (pending / "part" / "a.bin").write_bytes(content)
    return finish_point(pending, {"epoch": step})


def test_newest_point_is_found_and_older_ones_go(tmp_path: Path):
    for step in (5, 9, 10, 200):
        write_point(tmp_path, step)
    found = newest_point(tmp_path)
    assert found is not None and found.step == 200 and found.info == {"epoch": 200}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-200"]


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "list"])
def test_damaged_point_is_named_and_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture):
    write_point(tmp_path, 1)
    file = write_point(tmp_path, 2) / "part" / "a.bin"
    if damage == "flip":
        file.write_bytes(b"weightz")
    elif damage == "shorten":
        file.write_bytes(b"weight")
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / "step-2" / "complete.json").write_text('{"files": ')
    found = newest_point(tmp_path)
    assert found is not None and found.step == 1
    assert str(tmp_path / "step-2") in caplog.text


def test_unfinished_point_is_never_taken(tmp_path: Path):
    write_point(tmp_path, 1)
    (begin_point(tmp_path, 2) / "a.bin").write_bytes(b"half")
    found = newest_point(tmp_path)
    assert found is not None and found.step == 1
    assert newest_point(tmp_path / "nothing") is None
    write_point(tmp_path, 2, b"whole")
    found = newest_point(tmp_path)
    assert found is not None and found.step == 2


_WRITER = """
import sys
from pathlib import Path
from rwkv_speech.training.points import begin_point, finish_point
folder, content = Path(sys.argv[1]), bytes(range(256)) * 4096
print("ready", flush=True)
for step in range(1, 1000000):
    pending = begin_point(folder, step)
    for name in "abc":
        (pending / name).write_bytes(content)
    finish_point(pending, {"epoch": step})
"""


def _kill_writers(folder: Path, times: int) -> None:
    """Kill a process that does nothing but write points; after every kill the newest point must be whole."""
    moments = random.Random(1)
    for _ in range(times):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        before = newest_point(folder)
        time.sleep(0.02 + 0.1 * moments.random())
        writer.kill()
        writer.wait()
        found = newest_point(folder)
        assert found is not None or before is None
        for name in "abc" if found else "":
            assert (found.path / name).stat().st_size == 1 << 20


def test_killed_inside_a_save_leaves_a_whole_point(tmp_path: Path):
    _kill_writers(tmp_path, 3)


@pytest.mark.soak
@pytest.mark.parametrize("where", ["/dev/shm", None], ids=["tmpfs", "disk"])
def test_killed_inside_a_save_30_times(tmp_path: Path, where: str | None):
    folder = Path(where or tmp_path) / f"points-{os.getpid()}"
    try:
        _kill_writers(folder, 30)
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(Flags(str(folder), seed=3, train=12, valid=2, test=1))
    return folder


def arguments(corpus: Path, run: Path, **more: object) -> list[str]:
    values = {
        "device": "cpu", "proj_dir": run, "train_data": corpus / "train.jsonl", "valid_data": corpus / "valid.jsonl",
        "micro_bsz": 2, "workers": 0, "log_every": 1, "warmup_steps": 2, "epoch_count": 2, "save_steps": 1,
        "lr_adapter": 1e-3, **more,
    }  # fmt: skip
    return command_line(**values)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, which all tests leave as it is."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(arguments(corpus, run))
    return run


def _kill_until_done(corpus: Path, run: Path, kills: int, seed: int) -> int:
    """Start the same command, kill it after a random time that lets it come a little further, `kills` times."""
    moments, killed = random.Random(seed), 0
    for _ in range(kills):
        process = start(arguments(corpus, run))
        points = run / "resume"
        before = {path.name for path in points.glob("step-*")}
        deadline = time.monotonic() + 120
        while process.poll() is None and {path.name for path in points.glob("step-*")} == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.random() * 0.2)  # longer, and a run may end before it is killed
        killed += process.poll() is None
        process.kill()
        process.communicate()
    finish(arguments(corpus, run))
    return killed


def test_killed_run_ends_as_the_whole_one(corpus: Path, whole: Path, tmp_path: Path):
    assert _kill_until_done(corpus, tmp_path / "run", kills=3, seed=1) == 3
    assert results(tmp_path / "run") == results(whole)


@pytest.mark.soak
def test_killed_20_times_ends_as_the_whole_one(corpus: Path, whole: Path, tmp_path: Path):
    killed = 0
    for number in range(5):
        killed += _kill_until_done(corpus, tmp_path / f"run-{number}", kills=4, seed=number)
        assert results(tmp_path / f"run-{number}") == results(whole)
    assert killed == 20


def test_signals_save_and_end(corpus: Path, whole: Path, tmp_path: Path):
    """To the run alone, or, as a terminal and a cluster do, to its data workers as well; one run takes them all."""
    run, lines, steps = tmp_path / "run", 1, 0
    table = run / "logs/csv/metrics.csv"
    for number, to_all, later in (signal.SIGTERM, False, 0), (signal.SIGTERM, True, 0.02), (signal.SIGINT, True, 0):
        argv = arguments(corpus, run, save_steps=1000, workers=int(to_all))
        process = start(argv, start_new_session=True)
        while not (table.exists() and table.read_text().count("\n") > lines):  # the first step is done
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(later)  # somewhere else in a step
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
        shown, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors[-3000:]
        assert len(SAID_TO_END.findall(shown)) == 1 and "the same command resumes" in shown
        assert "Traceback" not in errors
        point = newest_point(run / "resume")
        assert point is not None and point.step > steps
        lines, steps = table.read_text().count("\n"), point.step
    finish(argv)
    assert results(run) == results(whole)


def test_finished_run_says_so_and_is_left_as_it_is(
    corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    argv = arguments(corpus, run)
    before, error = results(run), load_trained(run / "last.safetensors").metrics["error"]
    assert train_script.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"{run}: this run is finished, with 2 epochs; an --epoch_count above 2 resumes it" in shown
    assert f"last WER {100 * error:.2f} % (epoch 2)" in shown and f"trained weights are in {run}" in shown
    assert train_script.main([*argv, "--epoch_count", "1"]) == 0
    assert "with 2 epochs, more than --epoch_count 1 asks for" in capsys.readouterr().out
    assert results(run) == before
    finish([*argv, "--resume", "no"])
    assert "--resume no: this one goes into" in capsys.readouterr().out
    assert results(tmp_path / "run-2") == before == results(run)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_extended_run_takes_the_rates_of_the_longer_one(
    corpus: Path, tmp_path: Path, schedule: str, capsys: pytest.CaptureFixture[str]
):
    for name, counts in (("whole", [2]), ("extended", [1, 2])):
        for count in counts:
            argv = arguments(corpus, tmp_path / name, epoch_count=count, lr_schedule=schedule, valid_data="")
            assert train_script.main(argv) == 0
    shown = capsys.readouterr().out
    assert "resuming" in shown and "epoch 2 of 2" in shown
    assert "learning rates as in a run of 12 steps from its start: adapter" in shown
    whole, extended = (tmp_path / name for name in ("whole", "extended"))
    for rate in ("lr_adapter", "lr_state"):
        assert column(extended, rate)[6:] == column(whole, rate)[6:] and len(column(whole, rate)) == 12
    if schedule == "constant":
        assert load_trained(extended / "last.safetensors").metrics["step"] == 12
        one, two = (load_file(run / "last.safetensors") for run in (whole, extended))
        assert all(torch.equal(x, two[name]) for name, x in one.items())


def test_other_batches_keep_the_best_and_the_place_in_the_schedule(corpus: Path, tmp_path: Path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    # No WER is lower by more than 10: the third validation is the second that does not help, and ends the run.
    early = {"patience": 2, "min_delta": 10}
    assert train_script.main(arguments(corpus, run, **early)) == 0
    flags = {"epoch_count": 4, "micro_bsz": 4}
    assert train_script.main(arguments(corpus, run, **flags, **early)) == 0
    wers, best = column(run, "wer"), load_trained(run / "best.safetensors").metrics
    assert len(wers) == 3 and wers[best["epoch"] - 1] == min(wers)
    # After 2 epochs of 6 steps, 1 of 3: the rates are those of the third epoch of 4 of 3.
    assert train_script.main(arguments(corpus, whole, **flags, valid_data="")) == 0
    assert column(run, "lr_state")[12:] == column(whole, "lr_state")[6:9]


def test_moved_run_and_data_are_the_same_run(corpus: Path, tmp_path: Path):
    shutil.copytree(corpus, tmp_path / "here")
    base = tiny.BASE_MODELS[tiny.NAME]
    shutil.copy(base, tmp_path / base.name)
    argv = arguments(tmp_path / "here", tmp_path / "run", epoch_count=1, keep_best=1)
    assert train_script.main(argv) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "here").rename(tmp_path / "there")
    flags = {"load_model": tmp_path / base.name, "encoder": tiny.ENCODER, "epoch_count": 2,
             "vocab_file": tiny.VOCAB_FILE, "stack": tiny.STACK, "adapter_hidden": tiny.ADAPTER_HIDDEN,
             "keep_best": 1}  # fmt: skip
    assert train_script.main(arguments(tmp_path / "there", tmp_path / "moved", **flags)) == 0
    assert load_trained(tmp_path / "moved" / "last.safetensors").metrics["step"] == 12
    # One of the two, by WER: the other one is gone, though it was written under another path.
    assert len(list((tmp_path / "moved").glob("best-epoch-*"))) == 1


def test_other_settings_are_named(corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(whole, tmp_path / "run")
    argv = arguments(tmp_path / "corpus", tmp_path / "run")
    assert train_script.main([*argv, "--lr_state", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--lr_state: was 0.01, now 0.5" in error and error.count("\n") == 2
    # Other bytes under the same path.
    manifest = tmp_path / "corpus" / "train.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    assert train_script.main([*argv, "--epoch_count", "3"]) == 2
    error = capsys.readouterr().err
    assert "--train_data: was '12 utterances, " in error and "now '11 utterances, " in error and str(manifest) in error


def test_second_run_in_a_folder_ends_at_once(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = arguments(corpus, tmp_path / "run", epoch_count=500)
    first = start(argv)
    try:
        wait_for_a_point(first, tmp_path / "run")
        assert train_script.main(argv) == 2
        assert f"--proj_dir: {tmp_path / 'run'} is used by a run that has not ended" in capsys.readouterr().err
    finally:
        first.kill()
        first.communicate()
    point = newest_point(tmp_path / "run" / "resume")
    assert point is not None
    assert train_script.main([*argv, "--epoch_count", str(point.info["epoch"] + 1)]) == 0


def test_points_hold_the_trained_tensors_alone(whole: Path):
    point = newest_point(whole / "resume")
    assert point is not None
    state = torch.load(point.path / "trainer.ckpt", weights_only=False)
    assert set(state["state_dict"]) == {"model.initial_states.asr", *(f"model.adapter.{n}" for n in
                                        ("0.weight", "0.bias", "2.weight", "2.bias"))}  # fmt: skip
    assert len(state["optimizer_states"][0]["state"]) == 5
    assert len(load_file(whole / "last.safetensors")) == 5
    assert json.loads((point.path / "complete.json").read_text())["info"]["epoch"] == 2
