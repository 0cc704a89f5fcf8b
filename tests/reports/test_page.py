import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jiwer
import pytest
from run_files import write_texts

from rwkv_speech.errors import UserError
from rwkv_speech.reports.page import write_report
from rwkv_speech.reports.record import LogRow, add_metrics, start_metrics, write_run
from rwkv_speech.text import normalise_score

TEXTS = [
    ("good", "the weather is good today", "the weather is good today"),
    ("bad", "the weather is good today", "a weather was today good"),
    ("worse", "yes", "no no no"),
    ("again", "the sun and the moon", "a sun and a moon"),
]
SCRIPT = "<script>alert('x')</script>"


class Page(HTMLParser):
    """What a browser would make of the page: its tags, what they would load, and the text by section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: dict[str, list[str]] = {"": []}
        self._section, self._tag = "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self._tag = tag

    def handle_data(self, data: str) -> None:
        if self._tag == "h2" and data.strip():
            self._section = data
            self.text[data] = []
        elif self._tag != "style" and data.strip():
            self.text[self._section].append(data)
        if data.strip():
            self._tag = ""


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    start_metrics(folder)
    add_metrics(folder, *(LogRow(**{"epoch": 1} | row) for row in rows))


def training(steps: int = 300) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": i + 1, "epoch": i // 100 + 1, "loss": 3 / (i + 1), "lr_adapter": 1e-4, "lr_state": 1e-2,
         "grad_norm": 0.5, "audio_hours_per_hour": 100 + i, "data_wait": 0.01, "padding": 0.02, "memory": 9.5}
        for i in range(steps)
    ]  # fmt: skip
    wers = ((1, 0.5), (2, 0.125), (3, 0.25))
    return rows + [{"step": 100 * i, "epoch": i, "wer": wer, "cer": wer / 2} for i, wer in wers]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_metrics(tmp_path, training())
    write_texts(tmp_path, TEXTS)
    write_run(tmp_path, {"seed": 1, "train_data": SCRIPT}, "1 x cpu")
    return tmp_path


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


def test_page_is_well_formed_and_loads_nothing(run: Path):
    path = write_report(run)
    assert path == run / "report.html"
    ElementTree.fromstring(path.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))
    page = Page(path)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a"}
    loads = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert all(value.startswith("#") for value in loads)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import", path.read_text(encoding="utf-8"))
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_headline_is_the_last_wer_and_names_the_best(run: Path):
    page = page_of(run)
    assert run.name in page.text[""]
    assert "WER 25.00 %" in page.text[""]
    assert any("best 12.50 %" in text for text in page.text[""])


def test_charts_are_drawn_of_what_there_is(run: Path):
    titles = {"Loss", "Error rates", "Learning rate, adapter", "Learning rate, initial state", "Gradient norm"}
    page = page_of(run)
    assert page.tags["svg"] == 5 and titles <= set(page.text["Curves"])
    assert {"epoch", "optimizer step", "nats per target token", "% of words or characters"} <= set(page.text["Curves"])
    write_metrics(run, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    page = page_of(run)
    assert page.tags["svg"] == 1 and "Speed" not in page.text


def test_worst_utterances_come_first_and_good_ones_not_at_all(run: Path):
    heads = [text for text in page_of(run).text["Worst utterances"] if "WER" in text]
    assert re.findall("<bdi>(.*)</bdi>", write_report(run).read_text()) == ["worse", "bad", "again"]
    ref, hyp = ([normalise_score(text)] for text in TEXTS[1][1:])
    assert f"WER {100 * jiwer.wer(ref, hyp):.0f} %" in heads[1]


def words_of(path: Path, name: str) -> list[tuple[str, str, str]]:
    """(kind, above, below) of one utterance, read from the page."""
    root = ElementTree.fromstring(path.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n"))
    blocks = [div for div in root.iter("div") if div.get("class") == "utterance"]
    block = next(div for div in blocks if (div.find("span/bdi").text or "") == name)  # type: ignore[union-attr]
    found = []
    for word in block.iter("span"):
        kind = (word.get("class") or "").split()
        if kind[0] == "w":
            above, below = (part.text or "" for part in word)
            found.append((kind[1], above, below))
    return found


def test_alignment_shows_reference_above_and_hypothesis_below(run: Path):
    words = words_of(write_report(run), "bad")
    assert " ".join(above for _, above, _ in words if above != "·") == TEXTS[1][1]
    assert " ".join(below for _, _, below in words if below != "·") == TEXTS[1][2]
    kinds = Counter(kind for kind, _, _ in words)
    found = jiwer.process_words(TEXTS[1][1], TEXTS[1][2])
    assert (kinds["sub"], kinds["ins"], kinds["del"]) == (found.substitutions, found.insertions, found.deletions)


def test_long_hypotheses_are_cut(run: Path):
    write_texts(run, [("loop", "yes", "yes " + "no " * 500)])
    path = write_report(run)
    assert len(words_of(path, "loop")) == 80
    assert "and 421 more" in path.read_text()


def test_most_frequent_errors_are_counted(run: Path):
    rows = page_of(run).text["Most frequent errors"]
    at = rows.index("Substitutions")
    assert rows[at + 1 : at + 7] == ["said", "recognised", "times", "the", "a", "3"]
    at = rows.index("Insertions")
    assert rows[at + 1 : at + 5] == ["word", "times", "no", "2"]


def test_long_words_are_cut(run: Path):
    write_texts(run, [("endless", "ab" * 5000, "c" * 5000)])
    assert words_of(write_report(run), "endless") == [("sub", "ab" * 60 + "…", "c" * 120 + "…")]


def test_speed_is_summed_up_with_units(run: Path):
    rows = page_of(run).text["Speed"]
    at = rows.index("audio per time")
    assert rows[at : at + 6] == ["audio per time", "hours per hour", "249.5", "100", "399", "399"]
    at = rows.index("padding")
    assert rows[at : at + 3] == ["padding", "% of the encoder's input", "2"]


def test_numbers_stand_to_the_right(run: Path):
    text = write_report(run).read_text()
    assert '<td class="n">249.5</td>' in text and '<td class="n">3</td>' in text
    assert re.search(r"\.n \{ text-align: right", text)


def test_flags_versions_and_commit_are_there(run: Path):
    page = page_of(run)
    assert "--seed" in page.text["Flags"] and SCRIPT in page.text["Flags"]
    assert "torch version" in page.text["Where it ran"]


def test_nothing_from_the_run_becomes_markup(tmp_path: Path):
    folder = tmp_path / "<b>run&amp;"
    folder.mkdir()
    nasty = f"{SCRIPT}\"' &lt; \x00\x0b\x1f"
    write_texts(folder, [(nasty + "\ud800", f"{nasty} one two", f"x</span>{nasty}")])
    (folder / "run.json").write_text(json.dumps({"flags": {nasty: nasty}, "versions": {nasty: nasty}, "commit": nasty}))
    path = write_report(folder)
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert not Page(path).tags.keys() & {"script", "b"}
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)


def test_letters_of_every_script_stay(run: Path):
    # Joiners are no letters, but Persian and emoji fall apart without them.
    joined = "می\u200cخواهم 👩\u200d🚀 天气"
    write_run(run, {"task": joined}, "cpu")
    assert joined in page_of(run).text["Flags"]


def test_strange_records_do_not_stop_a_report(run: Path):
    (run / "run.json").write_text('{"flags": [1], "versions": null, "command": "train", "commit": 7}')
    page = page_of(run)
    assert "Flags" not in page.text and "7" in page.text["Where it ran"]


@pytest.mark.parametrize("left", ["metrics", "texts"])
def test_a_report_needs_only_one_of_both(run: Path, left: str):
    gone = run / ("validation.jsonl" if left == "metrics" else "logs/csv/metrics.csv")
    gone.unlink()
    page = page_of(run)
    assert ("Curves" in page.text) == (left == "metrics")
    assert ("Worst utterances" in page.text) == (left == "texts")
    refs, hyps = ([normalise_score(row[i]) for row in TEXTS] for i in (1, 2))
    wer = 0.25 if left == "metrics" else jiwer.wer(refs, hyps)
    assert f"WER {100 * wer:.2f} %" in page.text[""]


def test_a_run_without_validation_says_so(run: Path):
    (run / "validation.jsonl").unlink()
    write_metrics(run, [{"step": 1, "loss": 2.0}])
    assert "no validation" in page_of(run).text[""]


def test_drawing_waits_until_there_is_a_report():
    code = "import sys, rwkv_speech.reports.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_same_run_gives_the_same_page(run: Path):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_an_empty_folder_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="found neither metrics nor validation.jsonl, expected the --proj_dir"):
        write_report(tmp_path)
