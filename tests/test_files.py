from pathlib import Path

import pytest

from rwkv_speech.files import sha256_file, write_atomically, write_text_atomically


def test_write_atomically_makes_folders_and_replaces_whole(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "a.bin"
    for content in (b"old", b"newer"):
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
        assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_write_atomically_that_fails_leaves_the_old_file_only(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def half(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise error("disk full")

    with pytest.raises(error, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_write_atomically_shows_nothing_before_it_is_whole(tmp_path: Path):
    path = tmp_path / "last.safetensors"

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path and temporary != path and not path.exists()
        temporary.write_bytes(b"whole")

    write_atomically(path, write)
    assert path.read_bytes() == b"whole"


def test_sha256_file_is_the_standard_one(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == expected


def test_write_text_atomically_writes_utf8_with_plain_line_ends(tmp_path: Path):
    write_text_atomically(tmp_path / "a", "naïve\n")
    assert (tmp_path / "a").read_bytes() == "naïve\n".encode()
