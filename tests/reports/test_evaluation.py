import base64
import gzip
import hashlib
import itertools
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rwkv_speech.decoding.results import Row
from rwkv_speech.reports.evaluation import write_evaluation
from rwkv_speech.scoring.result import Evaluation
from rwkv_speech.scoring.speed import Speed

NASTY = "</script><script>alert(1)</script><b>\x01\x02&\ud800"
ROWS = [
    Row("good", 0, "the weather is good", "the weather is good", "en", "asr", 2.5, False, "ann", "/x/data/a b#.flac"),
    Row("bad", 1, "the sun and the moon", "sun at the moon two", "en", "asr", 7.0, False, "bob", "/x/data/é.wav", 3.5),
    Row(NASTY, 2, f"one {NASTY}", f"{NASTY} two", "de", "asr", 70.0, False, "ann"),
]


def page(tmp_path: Path, rows: list[Row] = ROWS, **more: Any) -> str:
    result = Evaluation(NASTY, rows, Speed(10.0, [{"encoding": 1.0, "decoding": 1.0}]), **more)
    path = write_evaluation(result, tmp_path / "x" / "run" / "e.html", f"best {NASTY}")
    return path.read_text(encoding="utf-8")


def data_of(text: str) -> dict[str, Any]:
    packed = re.search(r'<script type="application/octet-stream" id="data">([\w+/=]*)</script>', text)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))  # type: ignore[no-any-return]


class Tags(HTMLParser):
    """The tags of a page, the addresses that it would load, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.loads, self.handlers, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_a_page_loads_nothing_and_runs_its_own_script_only(tmp_path: Path):
    text = page(tmp_path)
    found = Tags(text)
    assert text.startswith("<!DOCTYPE html>") and found.tags.count("script") == 2 and not found.handlers
    assert not set(found.tags) & {"link", "img", "iframe", "object", "embed", "base", "b", "audio"}
    assert all((address or "").startswith("#") for address in found.loads)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert policy and script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy[1] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; media-src 'self' file:"
    )
    assert "innerHTML" not in script[1] and "eval" not in script[1]


def test_headline_numbers_and_tables(tmp_path: Path):
    text = " ".join(Tags(page(tmp_path, ROWS[:2])).text.split())
    assert "WER 33.33 %" in text and "bootstrap of 2 speakers" in text
    assert "2 utterances, 9 words, normalizer casefold" in text
    assert "words 33.33 % 7 1 1 1 9" in text and "5.0 times real time" in text
    assert "By duration" in text and "5 to 10 s 1 5 60.00 % 1 1 1" in text and "By language" not in text


def test_probabilities_of_words_are_drawn_where_there_are_any(tmp_path: Path):
    title = "Right words by their probability"
    rows = [replace(row, words=[(word, 0.9) for word in row.hyp.split()]) for row in ROWS[:2]]
    assert title in page(tmp_path, rows) and title not in page(tmp_path, ROWS[:2])


def test_references_without_words_have_no_rate(tmp_path: Path):
    text = " ".join(Tags(page(tmp_path, [Row("a", 0, "", "x y", None, "asr", 1.0, False)])).text.split())
    assert "no words in the references" in text and "2 were recognised" in text and "WER 200" not in text


def test_every_utterance_is_in_the_data_the_worst_first(tmp_path: Path):
    rows = [Row(f"u{i}", i, "a b c", "a b c d"[: i % 6], None, "asr", 1.0, False, ctc=f"c {i}") for i in range(300)]
    data = data_of(page(tmp_path, rows))
    assert sorted(data["index"]) == list(range(300)) and data["edits"] == sorted(data["edits"], reverse=True)
    assert data["ctc"] == [f"c {i}" for i in data["index"]]
    assert data["verdict"][0] == "WER 100 %, 3 errors" and data["wrong"][-1] is False
    assert "speaker" not in data and "language" not in data


def test_the_data_hold_alignments_groups_and_addresses_of_the_audio(tmp_path: Path):
    data = data_of(page(tmp_path, form="none"))
    at = data["id"].index("bad")
    assert data["words"][at] == "\x03the sun \x01and\x01at the moon \x02two"
    assert [data["language"]["names"][number] for number in data["language"]["of"]].count("de") == 1
    assert data["duration"]["names"] == ["2 to 5 s", "5 to 10 s", "30 s and more"]
    good = data["id"].index("good")
    root = "../" * (len(tmp_path.parts) + 1)
    assert [data["audio"][i] for i in (at, good)] == [f"{root}x/data/%C3%A9.wav", f"{root}x/data/a%20b%23.flac"]
    nasty = data["id"].index("</script><script>alert(1)</script><b>\ufffd\ufffd&\ufffd")
    assert data["audio"][nasty] is None and data["offset"][at] == 3.5 and "\ud800" not in json.dumps(data["words"])


def test_the_same_result_gives_the_same_page(tmp_path: Path):
    assert page(tmp_path) == page(tmp_path)


def drawn(address: Path, folder: Path) -> str:
    """What a browser makes of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here to draw the page")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", address.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_a_browser_draws_the_worst_and_lets_no_transcript_run(tmp_path: Path):
    rows = [*ROWS, *(Row(f"u{i}", 3 + i, "a b", "a c", None, "asr", 1.0, False) for i in range(90))]
    page(tmp_path, rows)
    shown = drawn(tmp_path / "x" / "run" / "e.html", tmp_path)
    found = Tags(shown)
    assert shown.count('class="utterance"') == 50 and "93 of 93 utterances" in shown
    assert found.tags.count("script") == 2 and found.tags.count("b") == 0 and "▶ listen" in found.text
    assert "alert(1)" in found.text


@pytest.mark.soak
def test_a_page_of_100_000_utterances_stays_small_and_is_drawn(tmp_path: Path):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(2, 9))) for _ in range(20_000)]
    likely = list(itertools.accumulate(1 / (i + 1) for i in range(len(words))))
    rows = []
    for i in range(100_000):
        ref = rng.choices(words, cum_weights=likely, k=rng.randint(3, 35))
        hyp = [rng.choice(words) if rng.random() < 0.05 else word for word in ref if rng.random() > 0.01]
        file = f"spk{i % 2000}/utt{i:06d}.flac"
        about = {"lang": "en", "task": "asr", "seconds": 0.4 * len(ref), "cut": False, "speaker": f"spk{i % 2000}"}
        rows.append(Row(file, i, " ".join(ref), " ".join(hyp), audio=f"/data/{file}", **about))  # type: ignore[arg-type]
    assert len(page(tmp_path, rows)) < 12e6
    shown = drawn(tmp_path / "x" / "run" / "e.html", tmp_path)
    assert shown.count('class="utterance"') == 50 and "100,000 of 100,000 utterances" in shown
