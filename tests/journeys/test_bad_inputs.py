"""What people hand to predict.py and to Python by mistake: it is named in one line, counted, and the rest is done."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import predict as predict_script
import pytest
import soundfile
import torch
from hard_files import sound, tones, with_data_size

from rwkv_speech import SpeechLM as Public
from rwkv_speech.errors import AudioError, UserError
from rwkv_speech.models.speech_lm import Parts, SpeechLM

QUICK = ["--device", "cpu", "--temperature", "0", "--vad", "none", "--max_new_tokens", "2", "--micro_bsz", "2"]
WAV, FLAC, MP3 = sound(tones(), "WAV"), sound(tones(), "FLAC"), sound(tones(), "MP3")


def floats(*values: float) -> bytes:
    return sound(np.array(values * 1_000, np.float32), "WAV", "FLOAT")


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


# Files that hold no usable audio, and what is said of each.
FILES: dict[str, tuple[bytes, str]] = {
    "empty.wav": (b"", "cannot be decoded"),
    "zeros.wav": (bytes(1_000), "cannot be decoded"),
    "text.wav": (b"This is no audio.\n" * 50, "cannot be decoded"),
    "random.mp3": (np.random.default_rng(0).bytes(3_000), "cannot be decoded"),
    "cut.wav": (WAV[:30_000], "is cut off or damaged"),
    "cut.flac": (FLAC[: len(FLAC) // 2], "is cut off or damaged"),
    "header.wav": (with_data_size(WAV, 0)[:44], "holds no audio"),
    "half a header.wav": (WAV[:30], "cannot be decoded"),
    "header.flac": (FLAC[:42], "cannot be decoded"),
    "nan.wav": (floats(0.1, float("nan")), "NaN or infinite"),
    "inf.wav": (floats(0.1, float("inf")), "NaN or infinite"),
    "raw.wav": (WAV[44:], "nobody can know the rate"),
    "no rate.wav": (patched(WAV, 24, bytes(4)), "cannot be decoded"),
    "no channels.wav": (patched(WAV, 22, bytes(2)), "cannot be decoded"),
    "unknown codec.wav": (patched(WAV, 20, b"\xee\xee"), "cannot be decoded"),
    "page.mp3": (b"<!DOCTYPE html><html><body>404</body></html>" * 20, "cannot be decoded"),
    "subtitles.wav": (b"1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 9, "no audio"),
    "playlist.wav": (b"ffconcat version 1.0\nfile good.wav\n", "cannot be decoded"),
    "playlist.mp3": (b"#EXTM3U\n#EXTINF:1,\ngood.wav\n", "cannot be decoded"),
    "pointer.flac": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "cannot be decoded"),
    "zipped.wav": (b"PK\x03\x04" + bytes(300), "cannot be decoded"),
    "page.ogg": (b"OggS\0\x02" + bytes(300), "cannot be decoded"),
    "tag.mp3": (b"ID3\x03\0\0\0\0\x07\x76" + bytes(1_014), "cannot be decoded"),
}
ROW = {"audio_filepath": "good.wav"}
MANIFESTS: dict[str, tuple[bytes, str]] = {
    "none.jsonl": (b"", "a manifest without a line"),
    "blank.jsonl": (b"\n  \n", "a manifest without a line"),
    "no json.jsonl": (b"good.wav\n", "line 1: is not JSON"),
    "list.jsonl": (b'["good.wav"]', "line 1: is not a JSON object"),
    "latin.jsonl": (b'{"audio_filepath": "caf\xe9.wav"}', "line 1: is not UTF-8"),
    "audio.jsonl": (WAV[:60], "line 1: is not UTF-8"),
    "no key.jsonl": (b'{"audio": "good.wav"}', "line 1: lacks 'audio_filepath'"),
    "number.jsonl": (b'{"audio_filepath": 3}', "'audio_filepath' is 3, expected a string"),
    "offset.jsonl": (json.dumps({**ROW, "offset": -1}).encode(), "'offset' is -1"),
    "nan.jsonl": (json.dumps({**ROW, "duration": float("nan")}).encode(), "'duration' is nan"),
    "behind.jsonl": (json.dumps({**ROW, "offset": 99}).encode(), "its segment at 99.0 s holds no sample"),
    "long.jsonl": (json.dumps({**ROW, "duration": 99}).encode(), "expected the 99.000 s that its duration says"),
    "gone.jsonl": (b'{"audio_filepath": "gone.wav"}', "gone.wav: no such audio file"),
    "state.jsonl": (json.dumps({**ROW, "task": "st"}).encode(), "found no state named 'st', expected one of asr"),
}
# Names behind which there is no audio, and what is said of each.
NAMES = {
    "gone.wav": "gone.wav: no such",
    "*.opus": "*.opus: no file matches",
    "gone/**": "gone/**: no file matches",
    "folder": "folder: a folder without an audio file",
    "folder.wav": "folder.wav: a folder without",
    "good.wav/a.wav": "good.wav/a.wav: no such",
    "~/gone.wav": "~/gone.wav: no such",
    "https://localhost/a.wav": "https://localhost/a.wav: no such",
    "good.wav,good.wav": "good.wav,good.wav: no such",
    "broken link.wav": "broken link.wav: no such audio file",
    "loop.wav": "loop.wav: cannot be read (Too many levels of symbolic links)",
    "pipe.wav": "pipe.wav: is a folder, a pipe or a device",
    "pipe.jsonl": "pipe.jsonl: is a folder, a pipe or a device",
    "/dev/zero": "/dev/zero: is a folder, a pipe or a device",
    "x" * 300 + ".wav": "x.wav: no such",
    "two\nlines.wav": "two\\nlines.wav: no such",
    "nul\0.wav": "nul\\x00.wav: no such",
    "": "'': no such",
}
CASES = {name: said for name, (_, said) in {**FILES, **MANIFESTS}.items()} | NAMES


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("bad")
    for name, (content, _) in {**FILES, **MANIFESTS}.items():
        (here / name).write_bytes(content)
    soundfile.write(here / "good.wav", 0.1 * np.sin(np.arange(8_000)), 16_000)
    for name in ("folder", "folder.wav", "taken/good.srt", "run"):
        (here / name).mkdir(parents=True)
    (here / "folder/notes.txt").touch()
    os.symlink("nowhere", here / "broken link.wav")
    os.symlink("loop.wav", here / "loop.wav")
    os.mkfifo(here / "pipe.wav")
    os.mkfifo(here / "pipe.jsonl")
    (here / "good.json").write_text(json.dumps(ROW))
    torch.manual_seed(0)
    SpeechLM.build(Parts("tiny")).save(here / "run/last.safetensors")
    return here


@pytest.fixture(scope="module")
def model(here: Path) -> Public:
    return Public.from_pretrained(here / "run")


@pytest.fixture
def call(here: Path, model: Public, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """predict.py in that folder, with the model that is there already."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(SpeechLM, "from_pretrained", lambda *args: model)
    return lambda *words: predict_script.main(["--proj_dir", "run", *QUICK, *words])


def test_there_are_forty_kinds():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES, ids=lambda x: repr(x[-30:]))
def test_what_cannot_be_read_is_named_and_the_rest_is_done(
    name: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert call(name, "good.wav") == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("good.wav\t") and shown.out.count("\n") == 1
    error, counts = (line for line in shown.err.splitlines() if not line.startswith(("note:", "warning:")))
    assert error.startswith("error: ") and CASES[name] in error
    assert counts.startswith("1 file, ") and counts.endswith(", 1 skipped")
    assert call(name) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and CASES[name] in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("name", [*FILES, *sorted(set(NAMES) - {"folder", "folder.wav"})], ids=lambda x: repr(x[-30:]))
def test_python_raises_an_error_that_names_it(name: str, here: Path, model: Public, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    said = FILES[name][1] if name in FILES else ""
    with pytest.raises(AudioError) as caught:
        model.transcribe(["good.wav", name], vad="none")
    assert said in str(caught.value) and "\n" not in str(caught.value)


WAVEFORMS = {
    "two axes": (np.zeros((2, 8_000), np.float32), AudioError),
    "whole numbers": (np.zeros(8_000, np.int32), AudioError),
    "not finite": (torch.full((8_000,), torch.nan), AudioError),
    "nothing": (None, AudioError),
    "a number": (3, AudioError),
    "a list of numbers": ([0.1, 0.2], AudioError),
    "a dictionary": ({"array": np.zeros(8_000)}, AudioError),
    "an open file": (io.BytesIO(WAV), AudioError),
    "a folder": (Path("folder"), AudioError),
    "bytes of text": (b"no audio", AudioError),
}


@pytest.mark.parametrize("name", WAVEFORMS)
def test_python_names_what_is_no_recording(name: str, here: Path, model: Public, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    given, error = WAVEFORMS[name]
    with pytest.raises(error):
        model.transcribe(given)


OPTIONS = [{"batch_size": 0}, {"batch_size": "all"}, {"beam": 0}, {"beam": "four"}, {"temperature": -1.0},
           {"temperature": [0.5, 0.2]}, {"vad": "webrtc"}, {"top_p": 2}, {"task": "st"}, {"beem": 4},
           {"max_new_tokens": 0}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_python_names_a_wrong_option(options: dict[str, object], model: Public):
    with pytest.raises(UserError, match=next(iter(options))):
        model.transcribe(np.zeros(8_000, np.float32), **options)


def test_no_permission(call: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    real = os.open

    def refuse(path: object, *args: object, **more: object) -> int:
        if str(path).endswith(".secret.wav"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **more)  # type: ignore[arg-type]

    Path("a.secret.wav").write_bytes(WAV)
    monkeypatch.setattr(os, "open", refuse)
    assert call("a.secret.wav", "good.wav") == 1
    assert "a.secret.wav: cannot be read (Permission denied)" in capsys.readouterr().err
    Path("a.secret.wav").unlink()


# Wrong flags: exit code 2, and nothing is transcribed.
WRONG = """
 => found no input, expected audio files, folders
--file_path good.wav,,good.wav => --file_path: found an empty name
-g good.wav => --g: there is no such flag
good.wav --output_format doc => --output_format: found 'doc', expected one or several of txt, srt
good.wav --output_format srt,,vtt => --output_format: found 'srt,,vtt'
good.wav --output_dir out => --output_dir: found without --output_format
good.wav --output_format srt --output_dir good.wav => --output_dir: 'good.wav' cannot be written to
good.wav --output_format srt --output_dir good.wav/x => --output_dir: 'good.wav/x' cannot be written to
good.wav --output_format srt --output_dir /proc/out => --output_dir: '/proc/out' cannot be written to
good.wav --output_format srt --output_dir taken => --output_dir: found that taken/good.srt is a folder
good.json --output_format json => --output_dir: found that good.json is an input
good.wav --skip_existing 1 => --skip_existing: found without --output_format
good.wav --verbose yes => --verbose: found 'yes'
good.wav --max_line_width 40 => --max_line_width: found without --word_timestamps
good.wav --max_line_count 2 => --max_line_count: found without --max_line_width
good.wav --word_timestamps 1 --max_line_width 0 => --max_line_width: found 0
good.wav --word_timestamps 1 --max_line_width 40 --max_words_per_line 3 => --max_words_per_line: has no effect
good.wav --task st => found no state named 'st', expected one of asr
good.wav --checkpoint gone => --checkpoint: no such file or folder
""".strip("\n").splitlines()


@pytest.mark.parametrize("case", WRONG, ids=lambda x: x[:70])
def test_wrong_flags_end_it(case: str, call: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    words, said = case.split(" => ")
    assert call(*words.split()) == 2
    shown = capsys.readouterr()
    assert (
        shown.out == "" and shown.err.startswith("error: ") and said in shown.err and len(shown.err.splitlines()) <= 3
    ), shown.err
