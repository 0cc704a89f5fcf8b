"""Any corpus becomes one of questions and answers: the frozen language model answers its transcripts."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rwkv_speech.config import AnswerConfig, ModelConfig
from rwkv_speech.data.manifest import read_lines
from rwkv_speech.decoding.answers import answers
from rwkv_speech.decoding.options import Options
from rwkv_speech.devices import compute_of
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.text_model import build_text_model
from rwkv_speech.text import as_prompt

Line = dict[str, Any]
_MINUTE = 60.0


def make_answers(config: AnswerConfig) -> Path:
    """Answer what a manifest's lines say, and write each whole line with its `answer`; the new manifest.

    A line keeps all its keys; `task` becomes "qa", and the transcript `source_text` in place of `text`. The lines come
    in the manifest's order, so that a run that is started again resumes behind the last whole one. Raises UserError for
    a manifest that cannot be read, and for an output that was made otherwise.
    """
    data, output = Path(config.data), Path(config.output)
    lines = _moved(read_lines(data, required=()), data, output)
    if output.exists() and output.samefile(data):
        raise UserError(f"--output: found {output}, which is --data, too; expected another name")
    made_by = _made_by(config)
    there = _there(output, made_by)
    counts = Counter({"there already": len(there)})
    asked = [line for line in lines if _key(line) not in there and _answerable(line, counts)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        for line, said, cut in _answered(config, asked):
            counts["cut"] += cut
            counts["answered" if said else "without an answer"] += 1
            if said:
                transcript = _transcript(line)
                rest = {key: value for key, value in line.items() if key not in ("text", "transcript")}
                rest |= {"task": "qa", "source_text": transcript, "answer": said, "answered_by": made_by}
                file.write(json.dumps(rest, ensure_ascii=False) + "\n")
                file.flush()
    skipped = [f"{counts[why]} {why}" for why in counts if why not in ("answered", "cut") and counts[why]]
    print(f"answered {counts['answered']} of {len(lines)} lines, {counts['cut']} answers cut at "
          f"--max_new_tokens {config.max_new_tokens}; skipped: {', '.join(skipped) or 'none'}")  # fmt: skip
    return output


def _made_by(config: AnswerConfig) -> str:
    """What decides the answers, kept with each of them."""
    names = ("form", "temperature", "top_p", "max_new_tokens", "seed")
    settings = [f"--{name} {getattr(config, name)}" for name in names]
    return " ".join([Path(config.load_model or "tiny").name, *settings])


def _moved(lines: list[Line], data: Path, output: Path) -> list[Line]:
    """The lines with their audio's paths relative to the folder of the new manifest, but for absolute ones."""
    way = os.path.relpath(data.absolute().parent, output.absolute().parent)
    return [
        line | {"audio_filepath": os.path.normpath(os.path.join(way, name))}
        if (name := line.get("audio_filepath"))
        else line
        for line in lines
    ]


def _transcript(line: Line) -> str:
    found = line.get("source_text") or line.get("transcript") or line.get("text")
    return found.strip() if isinstance(found, str) else ""


def _before(line: Line) -> str:
    found = line.get("prompt")
    return found if isinstance(found, str) else ""


def _answerable(line: Line, counts: Counter[str]) -> bool:
    why = "with an answer of their own" if "answer" in line else "" if _transcript(line) else "without a text"
    counts[why] += bool(why)
    return not why


def _key(line: Line) -> tuple[Any, ...]:
    """What tells a line from the others, before it is answered and after."""
    return line.get("audio_filepath"), line.get("offset"), line.get("id"), _before(line), _transcript(line)


def _there(output: Path, made_by: str) -> set[tuple[Any, ...]]:
    """The keys of the lines that an earlier run wrote, whose last one may not be whole and is then taken away."""
    if not output.exists():
        return set()
    whole = output.read_bytes().rpartition(b"\n")[0]
    os.truncate(output, len(whole) + bool(whole))
    if not whole:
        return set()
    lines = read_lines(output, required=())
    other = next((line.get("answered_by") for line in lines if line.get("answered_by") != made_by), made_by)
    if other != made_by:
        raise UserError(
            f"--output: {output} holds answers of {other or 'another source'}, expected those of {made_by}; give the "
            "same flags to go on with it, or another name"
        )
    return {_key(line) for line in lines}


def _answered(config: AnswerConfig, lines: list[Line]) -> Iterator[tuple[Line, str, bool]]:
    """Each line with the model's answer, in order, and whether it was cut; a bar counts them."""
    model = ModelConfig(
        load_model=config.load_model, vocab_file=config.vocab_file, device=config.device, precision=config.precision
    )
    parts, compute = Parts.of(model).filled(), compute_of(model)
    lm, tokenizer = build_text_model(parts, compute)
    options = Options.given(config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens)
    prompts = (as_prompt(config.form, _transcript(line), _before(line)) for line in lines)
    waiting: dict[int, tuple[str, bool]] = {}
    following = 0
    pace = 0.1 if sys.stderr.isatty() else _MINUTE
    with tqdm(total=len(lines), unit=" texts", mininterval=pace, maxinterval=pace) as bar:
        for found in answers(lm, tokenizer, prompts, options, config.micro_bsz, config.seed):
            waiting[found.number] = " ".join(found.text.split()), found.cut
            bar.update()
            while following in waiting:
                yield lines[following], *waiting.pop(following)
                following += 1
