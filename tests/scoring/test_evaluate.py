from pathlib import Path

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
