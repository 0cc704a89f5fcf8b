"""Lists of phrases: what they may hold, and how their mistakes are named."""

from pathlib import Path

import pytest

from rwkv_speech.data.phrases import read_phrases
from rwkv_speech.decoding.options import Options
from rwkv_speech.errors import UserError


def options(keywords: object, **others: float) -> Options:
    return Options.given(keywords=keywords, **others)  # type: ignore[arg-type] # wrong ones, too


def test_read_phrases_of_a_file_and_of_a_list(tmp_path: Path):
    file = tmp_path / "names of people.txt"
    file.write_bytes("\ufeffGrünwald\r\n\r\nnew   york\t3.5\r\nGrünwald\r\nC#\n".encode())
    found = {"Grünwald": 1.5, "new york": 3.5, "C#": 1.5}
    assert read_phrases(options(str(file), keyword_weight=1.5)) == found
    assert read_phrases(options(["Grünwald", "new york\t3.5", "C#"], keyword_weight=1.5)) == found
    assert read_phrases(Options.given()) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\n" + 201 * b"a", "line 2: found 201 characters, expected a phrase of at most 200"),
        (b"fine\n...\n", "line 2: found '...', expected a phrase of letters or digits"),
        (b"\t3\n", "line 1: found .*, expected a phrase"),
        (b"a\tmuch\n", "line 1: found 'much' behind the tab, expected a weight above 0 and at most 20"),
        (b"a\t-1\n", "line 1: found '-1' behind the tab"),
        (b"a\tnan\n", "line 1: found 'nan' behind the tab"),
        (b"a\t1\t2\n", "line 1: found '1.t2' behind the tab"),
        (b"a\t2\nb\na\t3\n", "line 3: found a second weight of 'a', expected one; delete the other line"),
        (b"a\n\xff\n", "line 2: found bytes that are not UTF-8; save the file as UTF-8"),
        (b"\n \n", "found no phrase, expected one a line"),
        (b"", "found no phrase, expected one a line"),
    ],
)
def test_read_phrases_names_file_and_line(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_phrases(options(str(file)))
    assert str(file) in str(error.value)


def test_read_phrases_without_a_file_or_of_no_text(tmp_path: Path):
    with pytest.raises(UserError, match="--keywords: .*nothing.txt: No such file"):
        read_phrases(options(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match="--keywords: .*Is a directory"):
        read_phrases(options(tmp_path))
    with pytest.raises(UserError, match="--keywords: found .*3.*, expected a file, or in Python a list"):
        read_phrases(options(["a", 3]))
    with pytest.raises(UserError, match="keywords: found no phrase"):
        read_phrases(options([" "]))
