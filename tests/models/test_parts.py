from dataclasses import replace
from pathlib import Path

import pytest

from rwkv_speech.config import PredictConfig, TrainConfig
from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models.parts import Parts


def test_what_is_left_empty_belongs_to_the_base_model():
    tiny = Parts().filled()
    assert (tiny.load_model, tiny.encoder, tiny.vocab_file, tiny.stack) == ("tiny", "tiny", "tiny", 3)
    assert Parts("tiny7").filled() == replace(tiny, load_model="tiny7")
    assert Parts(load_model="x.pth").filled() == Parts("x.pth", "microsoft/wavlm-large", "", 5, 2048, "#")
    assert Parts("x.pth", "y", "z", 2, 16, "|").filled() == Parts("x.pth", "y", "z", 2, 16, "|")


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.pth").touch()
    parts = Parts("base.pth", "microsoft/wavlm-large").filled()
    assert (parts.load_model, parts.encoder) == (str(tmp_path / "base.pth"), "microsoft/wavlm-large")


@pytest.mark.parametrize("config", [TrainConfig, PredictConfig])
def test_flags_and_a_dictionary_give_the_same_record(config: type[TrainConfig]):
    flags = {"load_model": "a.pth", "encoder": "b", "stack": 4, "n_layer": 2, "n_embd": 64}
    parts = Parts.of(config(**flags))
    assert parts == replace(Parts(**flags), separator="#") == Parts.from_dict({**vars(parts), "unknown": 1})


def recorded(folder: Path) -> tuple[Parts, Path]:
    """A checkpoint's parts, whose files lay in another folder."""
    (folder / "base.pth").write_bytes(b"weights")
    (folder / "enc").mkdir()
    parts = Parts("/gone/base.pth", "/gone/enc", "", 5, 2048, "#", 2, 64, sha256_file(folder / "base.pth"))
    return parts, folder / "last.safetensors"


def test_files_are_found_beside_the_checkpoint(tmp_path: Path):
    parts, path = recorded(tmp_path)
    found = parts.recorded_in(path, Parts())
    assert found == replace(parts, load_model=str(tmp_path / "base.pth"), encoder=str(tmp_path / "enc"))


def test_files_are_found_beside_the_run_s_folder(tmp_path: Path):
    parts, _ = recorded(tmp_path)
    found = parts.recorded_in(tmp_path / "run" / "last.safetensors", Parts())
    assert found == replace(parts, load_model=str(tmp_path / "base.pth"), encoder=str(tmp_path / "enc"))


def test_what_the_caller_gives_goes_before_what_is_recorded(tmp_path: Path):
    parts, path = recorded(tmp_path)
    found = parts.recorded_in(path, Parts(load_model="mine.pth", encoder="e", vocab_file="v", n_layer=9))
    assert (found.load_model, found.encoder, found.vocab_file, found.n_layer) == ("mine.pth", "e", "v", 9)
    assert found.stack == 5 and found.base_sha256 == parts.base_sha256


def test_another_file_of_the_name_is_not_taken_for_the_base_model(tmp_path: Path):
    parts, path = recorded(tmp_path)
    (tmp_path / "base.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match=rf"/gone/base\.pth .*SHA-256 {parts.base_sha256[:12]}.*--load_model"):
        parts.recorded_in(path, Parts())
    with pytest.raises(UserError, match="give the same file with --load_model"):
        replace(parts, base_sha256="00" * 32).check_base(parts.base_sha256, path)


@pytest.mark.parametrize(("flag", "name"), [("precision", "quant"), ("encoder_precision", "encoder_quant")])
def test_packed_weights_are_used_as_they_were_trained(tmp_path: Path, flag: str, name: str):
    parts, path = recorded(tmp_path)
    packed = replace(parts, **{name: "int8"})
    assert getattr(packed.recorded_in(path, Parts()), name) == "int8"
    assert getattr(parts.recorded_in(path, Parts.of(PredictConfig(**{flag: "nf4"}))), name) == "nf4"
    for given, found in (("nf4", "nf4"), ("fp32", "floats")):
        with pytest.raises(UserError, match=f"--{flag}: found {found}, but .* was trained with int8"):
            packed.recorded_in(path, Parts.of(PredictConfig(**{flag: given})))
    assert replace(packed, **{name: "nf4"}).frame_options.quant == ("nf4" if name == "encoder_quant" else "")


def test_a_missing_encoder_names_its_flag(tmp_path: Path):
    parts, path = recorded(tmp_path)
    (tmp_path / "enc").rmdir()
    with pytest.raises(UserError, match="/gone/enc is neither there nor in .*--encoder"):
        parts.recorded_in(path, Parts())
