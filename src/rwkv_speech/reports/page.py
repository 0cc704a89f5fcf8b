"""A finished run as one page, `report.html`: `python -m rwkv_speech.reports.page RUN`.

The page needs no network and runs no script. It shows what the run's folder holds (see run_record), and leaves out
the rest.
"""

import argparse
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import jiwer

from rwkv_speech.errors import UserError, exit_code
from rwkv_speech.files import write_text_atomically
from rwkv_speech.reports.charts import Point, Series, line_chart, with_trend
from rwkv_speech.reports.record import VALIDATION, read_metrics, read_run, read_texts
from rwkv_speech.scoring.metrics import Scores, score
from rwkv_speech.text import normalise_score

REPORT = "report.html"
_WORST = 25
_MOST_FREQUENT = 15
_MOST_WORDS = 80  # of an utterance: a hypothesis that repeats itself fills no page

_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Rows = list[dict[str, float]]

# Column of the metrics, what it is called, its unit, what it is multiplied by.
_SPEED = (
    ("audio_hours_per_hour", "audio per time", "hours per hour", 1.0),
    ("data_wait", "waiting for data", "% of the time", 100.0),
    ("padding", "padding", "% of the encoder's input", 100.0),
    ("target_tokens", "target tokens", "per step", 1.0),
    ("memory", "memory of a GPU, peak", "GiB", 1.0),
    ("grad_norm", "gradient norm", "", 1.0),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60656c; --page: #ffffff; --line: #d9dce0; --card: #f6f7f8;
  --s0: #1f6feb; --s1: #d2691e; --sub: #9a6700; --ins: #1a7f37; --del: #c62828; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa1a9; --page: #14171a; --line: #343a40;
  --card: #1d2125; --s0: #6cb0ff; --s1: #f0a060; --sub: #e3b341; --ins: #56d364; --del: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1080px;
  margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 8px 0; } p { margin: 4px 0; }
.soft { color: var(--soft); } .headline { font-size: 40px; font-weight: 650; margin: 8px 0 0; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 18px; }
.grid3 { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 18px; }
figure { margin: 0; padding: 12px; background: var(--card); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; } svg text { fill: var(--ink); }
svg .tick { fill: var(--soft); } .grid { stroke: var(--line); } .axis { stroke: var(--soft); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .faint { opacity: .35; stroke-width: 1; }
polyline.s0 { stroke: var(--s0); } polyline.s1 { stroke: var(--s1); } circle.s0 { fill: var(--s0); }
circle.s1 { fill: var(--s1); }
table { border-collapse: collapse; } th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.utterance { padding: 10px 0; border-bottom: 1px solid var(--line); }
.words { line-height: 1.35; margin-top: 4px; } .w { display: inline-block; margin: 0 7px 6px 0; vertical-align: top; }
.w span { display: block; min-height: 1.35em; } .w .hyp { color: var(--soft); }
.w.sub .hyp { color: var(--sub); font-weight: 600; } .w.ins .hyp { color: var(--ins); font-weight: 600; }
.w.del .ref { color: var(--del); font-weight: 600; text-decoration: line-through; }
.w.sub .ref { text-decoration: underline dotted var(--sub); }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Raises UserError naming the folder if it holds nothing to report, and naming a file of it that cannot be read.
    """
    metrics = [{k: v for k, v in asdict(row).items() if v is not None} for row in read_metrics(folder)]
    texts = read_texts(folder / VALIDATION)
    run = read_run(folder)
    if not (metrics or texts):
        raise UserError(
            f"{folder}: found neither metrics nor {VALIDATION}, expected the --proj_dir of a run; train there first"
        )
    errors = Errors.of(texts) if texts else None
    body = (
        _header(folder, metrics, errors),
        _curves(metrics),
        _utterances(errors),
        _frequent(errors),
        _speed(metrics),
        _circumstances(run),
    )
    write_text_atomically(folder / REPORT, _page(f"{folder.resolve().name}: training report", "\n".join(body)))
    return folder / REPORT


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    """For the page: escaped, and without what no page may hold (control characters, halves of surrogate pairs)."""
    return escape(_NO_TEXT.sub("\ufffd", str(value)))


def _section(title: str, *content: str) -> str:
    inner = "\n".join(part for part in content if part)
    return f"<section>\n<h2>{_text(title)}</h2>\n{inner}\n</section>" if inner else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int) -> str:
    """The last `numbers` columns hold numbers and stand to the right."""

    def cells(tag: str, row: Sequence[object]) -> str:
        first = len(row) - numbers
        marks = (' class="n"' if i >= first else "" for i in range(len(row)))
        return "".join(f"<{tag}{mark}>{_text(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table>\n<tr>{cells('th', head)}</tr>\n{lines}</table>"


def _column(rows: Rows, name: str, scale: float = 1.0) -> list[Point]:
    """(step, value) wherever the column has one; the number of the row where there is no step."""
    return [(row.get("step", float(i)), scale * row[name]) for i, row in enumerate(rows) if name in row]


def _header(folder: Path, rows: Rows, errors: "Errors | None") -> str:
    wers = [y for _, y in _column(rows, "wer")]
    if wers:
        headline, note = f"WER {100 * wers[-1]:.2f} %", f"last of {len(wers)} validations; best {100 * min(wers):.2f} %"
    elif errors:
        headline, note = f"WER {100 * errors.scores.wer:.2f} %", "of the texts below"
    else:
        headline, note = "no validation", "train with --valid_data to see word error rates here"
    counts = ""
    if errors:
        s = errors.scores
        counts = (
            f"{s.num_utterances:,} utterances, {s.ref_words:,} words: {s.substitutions:,} substitutions, "
            f"{s.insertions:,} insertions, {s.deletions:,} deletions; CER {100 * s.cer:.2f} %"
        )
    paragraphs = "".join(f'<p class="soft">{line}</p>\n' for line in (note, counts) if line)
    return f'<h1>{_text(folder.resolve().name)}</h1>\n<p class="headline">{headline}</p>\n{paragraphs}'


def _curves(rows: Rows) -> str:
    x_label, wer, cer = _by_epoch(rows, "wer"), _validations(rows, "wer"), _validations(rows, "cer")
    charts = [
        ("Loss", "optimizer step", "nats per target token", with_trend(_column(rows, "loss"))),
        ("Error rates", x_label, "% of words or characters", [Series("WER", wer), Series("CER", cer, 1)]),
        ("Learning rate, adapter", "optimizer step", "learning rate", [Series("", _column(rows, "lr_adapter"))]),
        ("Learning rate, initial state", "optimizer step", "learning rate", [Series("", _column(rows, "lr_state"))]),
        ("Gradient norm", "optimizer step", "norm", with_trend(_column(rows, "grad_norm"))),
    ]
    drawn = ((title, line_chart(title, x, y, series)) for title, x, y, series in charts)
    figures = "\n".join(f"<figure><figcaption>{title}</figcaption>\n{svg}</figure>" for title, svg in drawn if svg)
    return _section("Curves", f'<div class="grid2">{figures}</div>' if figures else "")


def _by_epoch(rows: Rows, name: str) -> str:
    """What the validations are counted by: epochs, unless there were several in one."""
    found = [row for row in rows if name in row]
    epochs = {row.get("epoch", -1.0) for row in found if row.get("step")}
    return "epoch" if len(epochs) == sum(bool(row.get("step")) for row in found) else "optimizer step"


def _validations(rows: Rows, name: str) -> list[Point]:
    """(epoch or step, per cent)."""
    if _by_epoch(rows, name) != "epoch":
        return _column(rows, name, 100.0)
    return [(row["epoch"], 100 * row[name]) for row in rows if name in row]


@dataclass(frozen=True)
class Utterance:
    """One utterance's words as (kind, reference word, hypothesis word), kind one of equal, sub, ins, del."""

    name: str
    words: tuple[tuple[str, str, str], ...]

    @property
    def edits(self) -> int:
        """Words that are wrong, missing or too many."""
        return sum(kind != "equal" for kind, _, _ in self.words)

    @property
    def wer(self) -> float:
        """As a fraction of the reference's words."""
        return self.edits / max(1, sum(kind != "ins" for kind, _, _ in self.words))


@dataclass(frozen=True)
class Errors:
    """What a set of hypotheses got wrong."""

    scores: Scores
    utterances: list[Utterance]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "Errors":
        """Align the words of rows with id, ref and hyp, normalised as scores are."""
        refs, hyps = ([normalise_score(row[key]) for row in rows] for key in ("ref", "hyp"))
        found = jiwer.process_words(refs, hyps)
        aligned = zip(rows, found.references, found.hypotheses, found.alignments, strict=True)
        utterances = [Utterance(str(row["id"]), _words(ref, hyp, chunks)) for row, ref, hyp, chunks in aligned]
        return cls(score(refs, hyps), utterances)

    def counted(self, kind: str) -> list[tuple[tuple[str, str], int]]:
        """The most frequent (reference word, hypothesis word) of one kind; of equal counts in the alphabet's order."""
        counts = Counter((ref, hyp) for u in self.utterances for k, ref, hyp in u.words if k == kind)
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_FREQUENT]


def _words(ref: list[str], hyp: list[str], chunks: list[jiwer.AlignmentChunk]) -> tuple[tuple[str, str, str], ...]:
    words: list[tuple[str, str, str]] = []
    for chunk in chunks:
        there, here = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "insert":
            words += [("ins", "", word) for word in here]
        elif chunk.type == "delete":
            words += [("del", word, "") for word in there]
        else:
            kind = "equal" if chunk.type == "equal" else "sub"
            words += [(kind, a, b) for a, b in zip(there, here, strict=True)]
    return tuple(words)


def _utterances(errors: Errors | None) -> str:
    worst = sorted(errors.utterances if errors else [], key=lambda u: (-u.wer, -u.edits, u.name))
    shown = [utterance for utterance in worst if utterance.edits][:_WORST]
    legend = (
        '<p class="soft">Reference above, hypothesis below: <span class="w sub"><span class="hyp">substituted</span>'
        '</span><span class="w ins"><span class="hyp">inserted</span></span><span class="w del"><span class="ref">'
        "deleted</span></span></p>"
    )
    blocks = [
        f'<div class="utterance"><span class="soft">{_text(u.name)} · WER {100 * u.wer:.0f} %, {u.edits} '
        f'{"error" if u.edits == 1 else "errors"}</span><div class="words">{_aligned(u)}</div></div>'
        for u in shown
    ]
    return _section("Worst utterances", legend, *blocks) if blocks else ""


def _aligned(utterance: Utterance) -> str:
    words = "".join(
        f'<span class="w {kind}"><span class="ref">{_text(ref or "·")}</span>'
        f'<span class="hyp">{_text(hyp or "·")}</span></span>'
        for kind, ref, hyp in utterance.words[:_MOST_WORDS]
    )
    more = len(utterance.words) - _MOST_WORDS
    return words + (f'<span class="soft">and {more} more</span>' if more > 0 else "")


def _frequent(errors: Errors | None) -> str:
    if errors is None:
        return ""
    kinds = (("sub", "Substitutions"), ("ins", "Insertions"), ("del", "Deletions"))
    tables = []
    for kind, title in kinds:
        counted = errors.counted(kind)
        if counted:
            head = ("said", "heard", "times") if kind == "sub" else ("word", "times")
            rows = ([*(word for word in pair if word), count] for pair, count in counted)
            tables.append(f"<div><h3>{title}</h3>\n{_table(head, rows, 1)}</div>")
    return _section("Most frequent errors", f'<div class="grid3">{"".join(tables)}</div>' if tables else "")


def _speed(rows: Rows) -> str:
    lines = []
    for name, title, unit, scale in _SPEED:
        values = [y for _, y in _column(rows, name, scale)]
        if any(values):  # on a CPU the memory is 0 throughout
            numbers = (statistics.median(values), min(values), max(values), values[-1])
            lines.append((title, unit, *(f"{number:,.4g}" for number in numbers)))
    return _section("Speed", _table(("", "unit", "median", "least", "most", "last"), lines, 4) if lines else "")


def _circumstances(run: dict[str, Any]) -> str:
    flags, versions = (run.get(key) for key in ("flags", "versions"))
    about = [(name, run[name]) for name in ("commit", "started", "device", "machine") if run.get(name)]
    if isinstance(run.get("command"), list):
        about.append(("command", " ".join(map(str, run["command"]))))
    if isinstance(versions, dict):
        about += [(f"{name} version", value) for name, value in versions.items()]
    given = sorted(flags.items()) if isinstance(flags, dict) else []
    return "\n".join(
        (
            _section("Where it ran", _table(("", ""), about, 0) if about else ""),
            _section("Flags", _table(("flag", "value"), ((f"--{k}", v) for k, v in given), 0) if given else ""),
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_speech.reports.page", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, its --proj_dir")
    args = parser.parse_args(argv)
    return exit_code(lambda: print(f"written to {write_report(args.run)}"))


if __name__ == "__main__":
    sys.exit(main())
