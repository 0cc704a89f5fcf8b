"""Small recordings, manifests of them, and lines that no manifest may hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def write_audio(file: Path, samples: int = 800, rate: int = 16_000) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.linspace(-0.5, 0.5, samples, dtype=np.float32), rate)
    return file


def write_manifest(file: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    lines = [row if isinstance(row, (bytes, str)) else json.dumps(row) for row in rows]
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return file


# A line, and what is said of it; the folder holds a.wav.
BAD_ROWS: list[tuple[dict[str, Any] | str | bytes, str]] = [
    ("{not json", "is not JSON"),
    ("[1]", "is not a JSON object but list"),
    ("null", "is not a JSON object but NoneType"),
    ('{"audio_filepath": "a.wav", "text": "x"} {"audio_filepath": "a.wav", "text": "x"}', "is not JSON"),
    ('{"audio_filepath": "a.wav", "text": "a\tb"}', "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    (b'{"audio_filepath": "a.wav", "text": "\xff"}', "is not UTF-8"),
    ({"audio_filepath": "a.wav"}, "lacks 'text'"),
    ({"text": "x"}, "lacks 'audio_filepath'"),
    ({"audio_filepath": "a.wav", "text": None}, "lacks 'text'"),
    ({"audio_filepath": "a.wav", "text": 5}, "'text' is 5, expected a string"),
    ({"audio_filepath": ["a.wav"], "text": "x"}, "'audio_filepath' is"),
    ({"audio_filepath": "a.wav", "text": "x", "lang": 1}, "'lang' is 1"),
    ({"audio_filepath": "a.wav", "text": "x", "id": 1}, "'id' is 1"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": -1}, "'duration' is -1, expected above 0"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": 0}, "'duration' is 0"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": float("nan")}, "'duration' is nan"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": 10**400}, "'duration' is 1000"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": True}, "'duration' is True"),
    ({"audio_filepath": "a.wav", "text": "x", "duration": "2"}, "'duration' is '2'"),
    ({"audio_filepath": "a.wav", "text": "x", "offset": -0.1}, "'offset' is -0.1, expected 0 or more"),
    ({"audio_filepath": "a.wav", "answer": []}, "'answer' is .*, expected a string of valid Unicode or a list"),
    ({"audio_filepath": "a.wav", "answer": ["x", None]}, "'answer' is"),
    ({"audio_filepath": "a.wav", "text": "x", "answer": 4}, "'answer' is 4"),
    ({"audio_filepath": "a.wav", "text": "x", "source_text": ["y"]}, "'source_text' is"),
    ({"turns": []}, r"'turns' is \[\], expected a list of objects, not empty"),
    ({"turns": "x"}, "'turns' is x, expected a list of objects"),
    ({"turns": [{"input": "x", "answer": "y"}, 5]}, "'turns' is .*, expected a list of objects"),
    ({"turns": [{"input": "x", "answer": "y"}, {"input": "x"}]}, "turn 2: lacks 'text'"),
    ({"turns": [{"text": "x"}]}, "turn 1: lacks 'audio_filepath'"),
    ({"turns": [{"input": "", "text": "x"}]}, "turn 1: 'input' is empty"),
    ({"turns": [{"input": 3, "text": "x"}]}, "turn 1: 'input' is 3, expected a string"),
    ({"turns": [{"input": "x", "audio_filepath": "a.wav", "text": "x"}]}, "turn 1: has both 'input' and 'audio_file"),
    ({"turns": [{"input": "x", "text": "x", "turns": []}]}, "turn 1: .*'turns'"),
    ({"turns": [{"audio_filepath": "gone.wav", "text": "x"}]}, "no such audio file .*gone.wav"),
    ({"turns": [{"audio_filepath": "a.wav", "text": "x", "offset": -1}], "id": 3}, "'id' is 3"),
    ({"audio_filepath": "gone.wav", "text": "x"}, "no such audio file .*gone.wav"),
    ({"audio_filepath": "a\0.wav", "text": "x"}, "no such audio file"),
    ('{"audio_filepath": "a.wav", "text": "\\ud800"}', "lone surrogate"),
]
