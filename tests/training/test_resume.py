"""Going on after an interruption: points on the disk, and runs that end as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train as train_script
from safetensors.torch import load_file

from rwkv_speech.files import sha256_file
from rwkv_speech.synthetic.make_corpus import make_corpus
from rwkv_speech.training.points import begin_point, finish_point, newest_point

ROOT = Path(__file__).parents[2]


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
    make_corpus(folder, {"train": 12, "valid": 2}, seed=3)
    return folder


def arguments(corpus: Path, run: Path, **flags: object) -> list[str]:
    values = {
        "device": "cpu", "proj_dir": run, "train_data": corpus / "train.jsonl", "valid_data": corpus / "valid.jsonl",
        "micro_bsz": 2, "workers": 0, "log_every": 1, "warmup_steps": 2, "epoch_count": 2, "save_steps": 1,
        "lr_adapter": 1e-3, **flags,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def start(argv: list[str], threads: int = 1) -> "subprocess.Popen[bytes]":
    code = f"import torch, sys; torch.set_num_threads({threads}); import train; sys.exit(train.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(argv: list[str]) -> None:
    process = start(argv)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


def results(run: Path) -> dict[str, str]:
    """SHA-256 of all checkpoints, and the losses that were logged."""
    found = {path.name: sha256_file(path) for path in run.glob("*.safetensors")}
    rows = (run / "logs/csv/metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    kept = [columns.index(name) for name in ("step", "loss", "lr_adapter", "lr_state", "grad_norm", "wer")]
    return found | {"metrics": "\n".join(",".join(row.split(",")[i] for i in kept) for row in rows)}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run gives."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(arguments(corpus, run))
    return results(run)


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


def test_killed_run_ends_as_the_whole_one(corpus: Path, whole: dict[str, str], tmp_path: Path):
    assert _kill_until_done(corpus, tmp_path / "run", kills=3, seed=1) == 3
    assert results(tmp_path / "run") == whole


@pytest.mark.soak
def test_killed_20_times_ends_as_the_whole_one(corpus: Path, whole: dict[str, str], tmp_path: Path):
    killed = 0
    for number in range(5):
        killed += _kill_until_done(corpus, tmp_path / f"run-{number}", kills=4, seed=number)
        assert results(tmp_path / f"run-{number}") == whole
    assert killed == 20


@pytest.mark.parametrize("later", [0, 0.02])
def test_sigterm_saves_and_ends(corpus: Path, whole: dict[str, str], tmp_path: Path, later: float):
    run = tmp_path / "run"
    argv = arguments(corpus, run, save_steps=1000)
    process = start(argv)
    table = run / "logs/csv/metrics.csv"
    while not (table.exists() and table.read_text().count("\n") > 1):  # the first step is done
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(later)  # somewhere else in a step
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    point = newest_point(run / "resume")
    assert point is not None and point.step > 0
    finish(argv)
    assert results(run) == whole


def test_finished_run_is_not_run_again(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = arguments(corpus, tmp_path / "run", epoch_count=1)
    assert train_script.main(argv) == 0
    before = results(tmp_path / "run")
    assert train_script.main(argv) == 0
    assert results(tmp_path / "run") == before
    assert train_script.main([*argv, "--resume", "no"]) == 0
    assert "--resume no: this one goes into" in capsys.readouterr().out
    assert results(tmp_path / "run-2") == before == results(tmp_path / "run")


def test_other_flags_are_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_script.main(arguments(corpus, tmp_path / "run", epoch_count=1)) == 0
    assert train_script.main(arguments(corpus, tmp_path / "run", epoch_count=1, lr_state=0.5)) == 2
    assert "--lr_state: was 0.01, now 0.5" in capsys.readouterr().err


def test_points_hold_the_trained_tensors_alone(corpus: Path, tmp_path: Path):
    assert train_script.main(arguments(corpus, tmp_path / "run", epoch_count=1)) == 0
    point = newest_point(tmp_path / "run" / "resume")
    assert point is not None
    state = torch.load(point.path / "trainer.ckpt", weights_only=False)
    assert set(state["state_dict"]) == {"model.initial_states.asr", *(f"model.adapter.{n}" for n in
                                        ("0.weight", "0.bias", "2.weight", "2.bias"))}  # fmt: skip
    assert len(state["optimizer_states"][0]["state"]) == 5
    assert len(load_file(tmp_path / "run" / "last.safetensors")) == 4 + 3
    assert json.loads((point.path / "complete.json").read_text())["info"]["epoch"] == 1
