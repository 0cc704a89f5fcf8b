"""predict.py as its users call it, with untrained weights: the texts are nonsense, but the same ones every time."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import predict as predict_script
import pytest
import soundfile
import srt
import torch
import webvtt

from rwkv_speech import SpeechLM as Public
from rwkv_speech.models.speech_lm import Parts, SpeechLM

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--temperature", "0", "--vad", "none", "--max_new_tokens", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that give every one of the recordings some text."""
    file = tmp_path_factory.mktemp("run") / "last.safetensors"
    for seed in range(100):
        torch.manual_seed(seed)
        SpeechLM.build(Parts("tiny")).save(file)
        model = Public.from_pretrained(file)
        found = model.transcribe(list(map(noise, range(5))), temperature=0.0, vad="none", max_new_tokens=4)
        if all(transcript.text for transcript in found):
            return file.parent
    raise AssertionError("no weights give a text")


def noise(number: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(number).standard_normal(8_000 + 1_600 * number)).astype(np.float32)


@pytest.fixture
def audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: recordings of different noise and length, in folders, and things that are none."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["one.wav", "my talk, two.flac", "rec/x/one.ogg", "rec/y/three.wav", "rec/y/one.wav"]):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(name, noise(i), 16_000)
    Path("text.wav").write_text("no audio")
    return tmp_path


def call(run: Path, *words: object) -> int:
    return predict_script.main(["--proj_dir", str(run), *QUICK, *map(str, words)])


def test_one_text_stands_alone_and_several_behind_their_names(run: Path, audio: Path, capsys):
    assert call(run, "one.wav") == 0
    alone = capsys.readouterr()
    # What random weights say may be cut off at --max_new_tokens, and that is said.
    assert alone.out.count("\n") == 1 and all("--max_new_tokens" in line for line in alone.err.splitlines())
    assert call(run, "rec", "my talk, two.flac", "one.wav", "./one.wav") == 0
    shown = capsys.readouterr()
    lines = [line.split("\t") for line in shown.out.splitlines()]
    assert [name for name, _ in lines] == [
        "rec/x/one.ogg", "rec/y/one.wav", "rec/y/three.wav", "my talk, two.flac", "one.wav",
    ]  # fmt: skip
    assert lines[-1][1] == alone.out.rstrip("\n")
    assert shown.err.splitlines()[-1].startswith("5 files, 0.00 h of audio, ")
    assert not list(audio.glob("*.txt"))
    # As ever.
    assert call(run, "--file_path", "one.wav,rec/y/three.wav") == 0
    assert capsys.readouterr().out.splitlines() == ["\t".join(lines[-1]), "\t".join(lines[2])]
    assert call(run, "--file_path", "my talk, two.flac") == 0
    assert capsys.readouterr().out == lines[3][1] + "\n"


def test_every_format_is_written_and_read_by_others(run: Path, audio: Path, capsys):
    assert call(run, "*.wav", "rec", "--output_format", "all", "--output_dir", "out/new") == 1  # text.wav
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    where = {"one.wav": "one", "rec/x/one.ogg": "x/one", "rec/y/one.wav": "y/one", "rec/y/three.wav": "y/three"}
    assert set(shown) == set(where)
    assert len(list(Path("out").rglob("*.*"))) == 5 * 4
    for name, stem in where.items():
        file, text = f"out/new/{stem}", shown[name]
        found = json.loads(Path(f"{file}.json").read_text())
        assert found["text"].split() == text.split()
        seconds = soundfile.info(name).duration
        assert found["duration"] == found["segments"][0]["end"] == pytest.approx(seconds, abs=0.01)
        (cue,) = srt.parse(Path(f"{file}.srt").read_text())
        assert cue.end.total_seconds() == pytest.approx(seconds, abs=0.01)
        (caption,) = webvtt.read(f"{file}.vtt")
        (row,) = csv.DictReader(Path(f"{file}.tsv").read_text().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        for words in (cue.content, caption.text, row["text"], Path(f"{file}.txt").read_text()):
            assert words.split() == text.split() or set("<&") & set(text)


def test_a_part_of_a_recording_has_the_times_of_the_whole(run: Path, audio: Path, capsys):
    rows = [{"audio_filepath": "one.wav"}, {"audio_filepath": "one.wav", "offset": 0.2, "duration": 0.25}, {"x": 1}]
    Path("m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert call(run, "m.jsonl", "--output_format", "json") == 1
    shown = capsys.readouterr()
    assert [line.split("\t")[0] for line in shown.out.splitlines()] == ["one.wav", "one.wav@0.2"]
    assert "m.jsonl, line 3: lacks 'audio_filepath'" in shown.err and "1 skipped" in shown.err
    (segment,) = json.loads(Path("one@0.2.json").read_text())["segments"]
    assert (segment["start"], segment["end"]) == pytest.approx((0.2, 0.45))


def test_texts_do_not_depend_on_their_company(run: Path, audio: Path, capsys):
    for i in range(20):
        os.link("one.wav" if i % 2 else "rec/y/three.wav", f"rec/{i:02d}.wav")
    texts = []
    for number in (1, 3, 8):
        assert call(run, "rec", "--micro_bsz", number) == 0
        texts.append(capsys.readouterr().out)
        assert len(texts[-1].splitlines()) == 23
    assert texts[0] == texts[1] == texts[2]


def test_what_is_there_may_be_left_out(run: Path, audio: Path, capsys):
    assert call(run, "one.wav", "--output_format", "srt,json") == 0
    before = Path("one.srt").stat().st_mtime_ns
    capsys.readouterr()
    words = ["one.wav", "rec/y/three.wav", "--output_format", "srt,json", "--skip_existing", 1]
    assert call(run, *words) == 0 and Path("one.srt").stat().st_mtime_ns == before
    assert Path("three.srt").is_file() and "one.wav" not in capsys.readouterr().out
    Path("one.json").unlink()
    assert call(run, *words) == 0 and Path("one.json").is_file()
    assert call(run, *words) == 0 and call(run, *words, "gone.wav") == 1
    assert call(run, "one.wav", "--output_format", "srt") == 0 and Path("one.srt").stat().st_mtime_ns != before


def command(run: Path, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "predict.py"), "--proj_dir", str(run), *QUICK, *words]


def test_an_interruption_keeps_what_is_finished(run: Path, audio: Path):
    rng = np.random.default_rng(2)
    soundfile.write("long.wav", 0.1 * rng.standard_normal(16_000 * 1_800), 16_000)
    words = ["one.wav", "long.wav", "--output_format", "txt,srt", "--max_segment", "1", "--micro_bsz", "1"]
    process = subprocess.Popen(
        command(run, *words),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started = time.monotonic()
    while not Path("one.srt").exists() and time.monotonic() - started < 100:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.rstrip().endswith("interrupted"), err
    assert "Traceback" not in err and out.startswith("one.wav\t")
    assert sorted(path.name for path in audio.glob("*.*") if path.suffix in (".txt", ".srt", "")) == [
        "one.srt", "one.txt",
    ]  # fmt: skip


def test_output_that_nobody_reads_ends_the_command_quietly(run: Path, audio: Path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command(run, "one.wav"), stdout=write, stderr=subprocess.PIPE, text=True, cwd=audio, check=False
    )
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_conversation_goes_on_in_its_file(run: Path, audio: Path, capsys):
    assert call(run, "--session", "all.session", "one.wav", "rec/y", "--text", "the weather\n\nis good") == 0
    whole = capsys.readouterr().out
    assert whole.count("\n") == 5
    for words in (["one.wav"], ["rec/y/one.wav", "rec/y/three.wav"], ["--text", "the weather"], ["--text", "is good"]):
        assert call(run, "--session", "parts.session", *words) == 0
    assert capsys.readouterr().out == whole
    assert Path("parts.session").read_bytes() == Path("all.session").read_bytes()
    model = Public.from_pretrained(run)
    session = model.session(path="all.session")
    assert session.num_turns == 5 and session.say(Path("one.wav"), max_new_tokens=4).text != whole.splitlines()[0]


def test_mistakes_in_a_conversation(run: Path, audio: Path, capsys):
    assert call(run, "--session", "a.session", "text.wav") == 2
    assert "text.wav" in capsys.readouterr().err and not Path("a.session").exists()
    assert call(run, "--session", "a.session", "none.wav", "one.wav") == 1
    assert "none.wav: no such file" in capsys.readouterr().err and not Path("a.session").exists()
    assert call(run, "--session", "text.wav", "one.wav") == 2
    assert "text.wav: cannot be read as a session" in capsys.readouterr().err
    assert call(run, "--text", "the weather") == 2
    assert "--text: found without --session" in capsys.readouterr().err
    assert call(run, "--session", "a.session", "one.wav", "--output_format", "srt") == 2
    assert "--output_format: has no effect with --session" in capsys.readouterr().err
    assert call(run, "--session", "a.session", "one.wav", "--max_segment", "9") == 2
    assert "--max_segment: has no effect with --session" in capsys.readouterr().err
    assert call(run, "--session", "a.session") == 2
    assert "found no input" in capsys.readouterr().err
