import random
import sys
from pathlib import Path

import pytest

from rwkv_speech.errors import UserError
from rwkv_speech.synthetic.programs import Program, read_programs


def test_a_list_has_a_language_and_a_command_in_each_line(tmp_path: Path):
    python = sys.executable
    (tmp_path / "voices").write_text(f"# voices\n\nen '{python}' a.py '{{text}} b' {{wav}}\n  fr '{python}' {{wav}}\n")
    assert read_programs(str(tmp_path / "voices")) == [
        Program("en-3", "en", (python, "a.py", "{text} b", "{wav}")),
        Program("fr-4", "fr", (python, "{wav}")),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("en sh -c x", "line 2: found 'en sh -c x', expected a language and a command with {wav}"),
        ("en 'sh {wav}", "line 2: No closing quotation"),
        ("en no-such-program {wav}", "line 2: found no program 'no-such-program'"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, line: str, said: str):
    (tmp_path / "voices").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=said):
        read_programs(str(tmp_path / "voices"))
    with pytest.raises(UserError, match="absent: .*No such file.*flite -o {wav}"):
        read_programs(str(tmp_path / "absent"))


def test_programs_that_fail():
    for words, said in (("exit 4", "sh ended with 4: it said nothing"), ("true", "sh spoke no line: .*line.wav")):
        with pytest.raises(UserError, match=f"en-1: {said}"):
            Program("en-1", "en", ("sh", "-c", words, "{wav}")).say("Hello", random.Random(0))
