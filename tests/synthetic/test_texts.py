from pathlib import Path

import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.synthetic.texts import Lines, is_held_out, read_texts


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_files_of_one_name_and_size_are_translations(tmp_path: Path):
    write(
        tmp_path,
        {"en/a.txt": "one\n\nthree", "es/a.txt": "uno\ndos\n", "fr/a.txt": "un\ndeux\ntrois\n", "b.txt": " x  y\n"},
    )
    found = {lines.langs: lines.rows for lines in read_texts(str(tmp_path))}
    assert found == {
        ("es",): [("uno",), ("dos",)],
        ("en", "fr"): [("one", "un"), ("", "deux"), ("three", "trois")],
        ("",): [("x y",)],
    }


def test_weights_and_several_folders(tmp_path: Path):
    first, second = write(tmp_path / "1", {"en/a.txt": "a"}), write(tmp_path / "2", {"ru/deep/b.txt": "\ufeffда\n"})
    found = read_texts(f"{first}@3,{second}")
    assert [(lines.name, lines.weight, lines.rows) for lines in found] == [
        ("1/a.txt", 3.0, [("a",)]),
        ("2/deep/b.txt", 1.0, [("да",)]),
    ]


def test_one_line_of_fifty_is_held_out_by_its_content():
    rows = [(f"line {i}", "") for i in range(5000)]
    lines = Lines("x", ("en", "es"), rows, 1.0)
    assert len(lines.held_out().rows) == pytest.approx(100, abs=40)
    assert sorted(lines.held_out().rows + lines.kept().rows) == sorted(rows)
    assert all(is_held_out(row) == is_held_out((row[0], "other")) for row in rows[:100])


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_folder_without_text_is_named(tmp_path: Path, content: str | None):
    write(tmp_path, {} if content is None else {"en/a.txt": content})
    with pytest.raises(UserError, match=f"--texts: {tmp_path} holds no .txt file"):
        read_texts(str(tmp_path))


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt cannot be read as UTF-8"):
        read_texts(str(tmp_path))
