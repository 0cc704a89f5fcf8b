import sys
from pathlib import Path

import eval as eval_script
import pytest
from manifests import write_audio, write_manifest

from rwkv_speech.scoring.evaluate import result_stem


def test_every_set_and_checkpoint_has_files_of_its_own(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").touch()
    sets = [str(tmp_path / folder / "test.jsonl") for folder in ("a", "b")]
    stems = {
        result_stem(spec, weights)
        for spec in sets
        for weights in ("best.safetensors", "last.safetensors", "x/best.pth")
    }
    assert len(stems) == 6
    assert result_stem(sets[0], "best.safetensors").startswith("eval-best-test-")
    assert result_stem(sets[0], "untrained") == result_stem(sets[0], "untrained")
    assert "/" not in result_stem("hf:a/b:train[:1%]", "best.safetensors")


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib.figure"])
def test_without_the_packages_that_draw_there_is_no_page_and_no_failure(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("rwkv_speech.reports.charts", *(name for name in sys.modules if name.startswith(missing))):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    write_audio(tmp_path / "a.wav", 8000)
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "text": "six"})
    argv = ["--untrained", "1", "--load_model", "tiny", "--max_new_tokens", "4", "--device", "cpu"]
    assert eval_script.main([*argv, "--proj_dir", str(tmp_path / "run"), "--eval_data", str(manifest)]) == 0
    assert f"note: no page, for it needs the package {missing}" in capsys.readouterr().out
    assert sorted(path.suffix for path in (tmp_path / "run").iterdir()) == [".json", ".jsonl"]
