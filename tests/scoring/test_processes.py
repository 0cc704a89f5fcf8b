import json
import signal
from pathlib import Path

import eval as eval_script
import numpy as np
import pytest
import soundfile

from rwkv_speech.config import EvalConfig
from rwkv_speech.errors import UserError
from rwkv_speech.scoring import processes


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two manifests, the second with more recordings, one of them broken."""
    folder = tmp_path_factory.mktemp("sets")
    for name, size in (("one", 3), ("two", 5)):
        rows = []
        for i in range(size):
            audio = f"{name}{i}.wav"
            soundfile.write(folder / audio, np.random.default_rng(i).normal(0, 0.1, 8000 + 3000 * i), 16000)
            rows.append({"audio_filepath": audio, "text": f"six {i}", "speaker": i % 2})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "two3.wav").write_bytes(b"RIFF")
    return f"{folder / 'one.jsonl'},{folder / 'two.jsonl'}"


def results(folder: Path, sets: str, device: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    argv = ["--untrained", "1", "--load_model", "tiny", "--max_new_tokens", "8", "--max_bad", "1", "--device", device]
    assert eval_script.main([*argv, "--proj_dir", str(folder), "--eval_data", sets]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("skipped 1 recordings: 1 broken") == 1
    found = {}
    for path in folder.iterdir():
        content = "".join(line for line in path.read_text().splitlines(True) if "times real time" not in line)
        if path.suffix == ".json":
            summary = json.loads(content)
            assert summary.pop("speed")["processes"] == (2 if device == "cpu:2" else 1)
            content = json.dumps(summary)
        found[path.name] = content
    return found


def test_several_processes_give_the_files_of_one(sets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = results(tmp_path / "a", sets, "cpu", capsys)
    assert len(one) == 7 and "two3.wav" in one["bad_files.jsonl"]
    assert results(tmp_path / "b", sets, "cpu:2", capsys) == one


def test_what_is_wrong_in_a_process_is_said_by_the_first(sets: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    argv = ["--untrained", "1", "--load_model", "tiny", "--device", "cpu:2", "--n_layer", "99"]
    assert eval_script.main([*argv, "--proj_dir", str(tmp_path), "--eval_data", sets]) == 2
    shown = capfd.readouterr().err
    assert shown.startswith("error: --n_layer: given 99") and "Traceback" not in shown


def _killed(config: EvalConfig, rank: int, world_size: int, sender: object) -> None:
    signal.raise_signal(signal.SIGKILL)


def test_a_process_that_is_killed_is_an_error(sets: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_work", _killed)
    with pytest.raises(UserError, match="--device: process . of 2 ended early"):
        list(processes.decode_all(EvalConfig(device="cpu:2", eval_data=sets)))
