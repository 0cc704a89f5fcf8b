"""A small language model of a text: what is learned, resumed and written."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rwkv_speech import tiny
from rwkv_speech.errors import UserError
from rwkv_speech.models import splice
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.synthetic import world
from rwkv_speech.synthetic.lesson_batches import LessonBatches
from rwkv_speech.synthetic.pretrain_lm import Flags, Pretraining, pretrain
from rwkv_speech.synthetic.world_lessons import WorldLessons
from rwkv_speech.tokenizer import WorldTokenizer

SIZES = {"n_layer": 1, "n_embd": 64, "positions": 300, "vocab": "450", "bf16": 0, "threads": 1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for lang, words in (("en", "one two three four"), ("es", "uno dos tres cuatro")):
        (folder / lang).mkdir()
        lines = [" ".join(words.split()[(i + j) % 4] for j in range(1 + i % 3)) + f" {i}" for i in range(150)]
        (folder / lang / "a.txt").write_text("\n".join(lines))
    return folder


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of text alone: eSpeak's durations differ by parts of a millisecond from call to call."""
    texts = tmp_path / "texts"
    (texts / "de").mkdir(parents=True)
    (texts / "de/a.txt").write_text("\n".join(f"Satz Nummer {i}" for i in range(150)))
    whole = Flags(str(tmp_path / "whole"), texts=str(texts), steps=4, **SIZES)
    pretrain(whole)
    parted = Flags(str(tmp_path / "parted"), texts=str(texts), steps=4, save_steps=2, **SIZES)
    pretrain_until(parted, 2)
    facts = pretrain(parted)
    assert "resuming behind step 2" in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / "rwkv6.safetensors") for name in ("whole", "parted"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert facts["steps"] == 4 and facts["held_out_perplexity"] > 1
    assert f"{facts['parameters']}" in (tmp_path / "parted/CARD.md").read_text()
    model = RWKV6.from_pretrained(tmp_path / "parted/rwkv6.safetensors")
    assert model.sizes.vocab == WorldTokenizer(tmp_path / "parted/vocab.txt").vocab_size
    with pytest.raises(UserError, match=r"--lr: found 0.1, but .*parted holds a run with 0.002"):
        pretrain(Flags(str(tmp_path / "parted"), texts=str(texts), steps=4, lr=0.1, **SIZES))


def pretrain_until(config: Flags, step: int) -> None:
    """As if it was killed behind a step."""
    run = Pretraining(config)
    for number in range(step):
        run.learn(run.batches[number])
    run.save()


DIES = """
import os, signal, sys
from rwkv_speech.synthetic import pretrain_lm
made = pretrain_lm.LessonBatches.__getitem__
def dies(batches, step):
    os.kill(os.getpid(), signal.SIGSEGV) if step == 3 else None
    return made(batches, step)
pretrain_lm.LessonBatches.__getitem__ = dies
sys.exit(pretrain_lm.main(sys.argv[1:]))
"""


def test_a_data_worker_that_dies_is_said_and_loses_nothing_that_was_saved(tmp_path: Path, texts: Path):
    flags = {**SIZES, "out": tmp_path / "out", "texts": texts, "steps": 9, "save_steps": 1}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run([sys.executable, "-c", DIES, *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    match = re.search(r"the lessons died at step \d; the same command resumes behind step (\d)$", ended.stderr.strip())
    assert match, ended.stderr
    run = Pretraining(Flags(str(tmp_path / "out"), texts=str(texts), steps=9, save_steps=1, **SIZES))
    run.resume()
    assert run.step == int(match[1])


def test_it_learns(tmp_path: Path, texts: Path):
    sizes = SIZES | {"lr": 1e-2}
    first = pretrain(Flags(str(tmp_path / "first"), texts=str(texts), steps=1, **sizes))
    later = pretrain(Flags(str(tmp_path / "later"), texts=str(texts), steps=40, **sizes))
    assert later["held_out_perplexity"] < 0.7 * first["held_out_perplexity"]


def test_world_lessons_cover_all_tasks_and_keep_test_lines_apart():
    lessons, rng = WorldLessons(), random.Random(0)
    drawn = [lessons.draw(rng) for _ in range(1500)]
    assert {lesson.instruction for lesson in drawn} >= {"", "answer: ", "topic: ", "chat: ", "lang: ", "es: ", "ru: "}
    assert max(len(lesson.turns) for lesson in drawn) > 2
    assert {turn.lang for lesson in drawn for turn in lesson.turns} == {"en", "es", "fr", "it", "ru"}
    test_questions = {world.draw(rng, "qa", "en", part="test").said for _ in range(100)}
    assert not test_questions & {
        turn.said for lesson in drawn if lesson.instruction == "answer: " for turn in lesson.turns
    }


def test_batches_hold_prompts_and_labels_of_each_lesson(tmp_path: Path):
    batches = LessonBatches(WorldLessons(), WorldTokenizer(tiny.VOCAB_FILE), 2000, ramp=1, seed=3)
    batch = batches[0]
    spliced = batch.spliced
    assert len(batch.blends) == len(spliced.audio_positions) > 0
    assert 2000 <= len(spliced.labels) == spliced.cu_seqlens[-1] < 2500
    ends = spliced.labels[spliced.cu_seqlens[1:] - 1]
    assert (ends == 0).all()  # the end of text is learned at the last position of each lesson
    assert (spliced.labels[spliced.audio_positions] == splice.IGNORE).all()
    again = batches[0]
    assert torch.equal(again.blends, batch.blends) and torch.equal(again.spliced.labels, spliced.labels)
    assert len(batches[1].spliced.labels) != len(spliced.labels) or not torch.equal(batches[1].blends, batch.blends)
