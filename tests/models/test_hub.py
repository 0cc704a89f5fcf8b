"""Repositories of a hub, which is a small server of the same calls."""

import os
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants

from rwkv_speech.errors import UserError
from rwkv_speech.models.hub import download, front_matter, is_id, upload


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "README.md").write_text(front_matter({"license": "mit"}, []) + "\n# words\n")
    (folder / "best.safetensors").write_bytes(bytes(range(256)) * 50)
    return folder


def test_what_is_uploaded_is_downloaded(hub: Hub, folder: Path):
    assert upload(folder, "me/run", endpoint=hub.address).startswith(f"{hub.address}/me/run/commit/")
    found = download("me/run", "best.safetensors", hub.address)
    assert found.read_bytes() == (folder / "best.safetensors").read_bytes()
    assert hub.repos["me/run"]["README.md"] == (folder / "README.md").read_bytes() and not hub.private
    (folder / "best.safetensors").write_bytes(b"new")
    upload(folder, "me/run", endpoint=hub.address)
    assert download("me/run", "best.safetensors", hub.address).read_bytes() == b"new"


def test_a_private_repository_is_there_for_its_owner(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    upload(folder, "me/run", is_private=True, endpoint=hub.address)
    assert hub.private == {"me/run"}
    assert download("me/run", "README.md", hub.address).exists()
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match="me/run: .*no such repository on the hub that you may see"):
        download("me/run", "best.safetensors", hub.address)


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/run", "", "me/run: found no token of the hub, expected one that may write; run: hf auth login"),
        ("me/run", "hf_another", "me/run: the hub refuses the token, expected one that the token may write to"),
        ("another/run", TOKEN, "another/run: the hub refuses the token"),
        ("me/a--b", TOKEN, "me/a--b: the hub refuses it .*expected NAME/REPO"),
    ],
)
def test_uploads_that_are_refused(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, repo: str, token: str, message: str
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "none"))
    with pytest.raises(UserError, match=message):
        upload(folder, repo, endpoint=hub.address)
    assert not any(hub.repos.values())


def test_a_card_that_the_hub_refuses_says_why(hub: Hub, folder: Path):
    (folder / "README.md").write_text(front_matter({"license": "My Own"}, []))
    with pytest.raises(UserError, match='me/run: .*"license" is not one of the list'):
        upload(folder, "me/run", endpoint=hub.address)


def test_what_is_not_there_is_named(hub: Hub, folder: Path):
    with pytest.raises(UserError, match="me/gone: found no folder or file of this name here, and no such repository"):
        download("me/gone", "best.safetensors", hub.address)
    (folder / "best.safetensors").unlink()
    upload(folder, "me/run", endpoint=hub.address)
    with pytest.raises(UserError, match=r"me/run: not a run, expected a file best.safetensors"):
        download("me/run", "best.safetensors", hub.address)


def test_a_hub_that_does_not_answer_is_said_unless_the_file_is_here(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    upload(folder, "me/run", endpoint=hub.address)
    found = download("me/run", "README.md", hub.address)
    nowhere = "http://127.0.0.1:9"
    assert download("me/run", "README.md", nowhere) == found
    with pytest.raises(UserError, match="me/run: .*the hub does not answer"):
        download("me/run", "best.safetensors", nowhere)
    with pytest.raises(UserError, match="me/run: .*the hub does not answer"):
        upload(folder, "me/run", endpoint=nowhere)


def test_an_id_names_nothing_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("output")
    assert is_id("me/run") and is_id("rwkv-6/digits_1.0")
    for name in ("run", "output/run", "a/b/c", "/me/run", "../run", "./run", "me/best.safetensors", "me/a.pth", ""):
        assert not is_id(name)
    assert not is_id(Path("me/run"))
