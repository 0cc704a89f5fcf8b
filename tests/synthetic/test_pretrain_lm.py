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
from rwkv_speech.models.base import RWKV7Sizes
from rwkv_speech.models.families import read_lm
from rwkv_speech.models.rwkv7 import RWKV7
from rwkv_speech.synthetic import rwkv7_init, world
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


@pytest.mark.parametrize("version", [6, 7])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int):
    """Of text alone: eSpeak's durations differ by parts of a millisecond from call to call."""
    texts = tmp_path / "texts"
    (texts / "de").mkdir(parents=True)
    (texts / "de/a.txt").write_text("\n".join(f"Satz Nummer {i}" for i in range(150)))
    sizes = SIZES | {"version": version, "n_layer": 2}
    whole = Flags(str(tmp_path / "whole"), texts=str(texts), steps=4, **sizes)
    pretrain(whole)
    parted = Flags(str(tmp_path / "parted"), texts=str(texts), steps=4, save_steps=2, **sizes)
    pretrain_until(parted, 2)
    facts = pretrain(parted)
    assert "resuming behind step 2" in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / f"rwkv{version}.safetensors") for name in ("whole", "parted"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert facts["steps"] == 4 and facts["held_out_perplexity"] > 1
    card = (tmp_path / "parted/CARD.md").read_text()
    assert f"{facts['parameters']}" in card and f"RWKV-{version}" in card
    model = read_lm(tmp_path / f"parted/rwkv{version}.safetensors")
    assert (
        f"x0{version}0" == model.FAMILY
        and model.sizes.vocab == WorldTokenizer(tmp_path / "parted/vocab.txt").vocab_size
    )
    with pytest.raises(UserError, match=r"--lr: found 0.1, but .*parted holds a run with 0.002"):
        pretrain(Flags(str(tmp_path / "parted"), texts=str(texts), steps=4, lr=0.1, **sizes))


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


@pytest.mark.parametrize("version", [6, 7])
def test_it_learns(tmp_path: Path, texts: Path, version: int):
    sizes = SIZES | {"lr": 1e-2, "version": version}
    first = pretrain(Flags(str(tmp_path / "first"), texts=str(texts), steps=1, **sizes))
    later = pretrain(Flags(str(tmp_path / "later"), texts=str(texts), steps=40, **sizes))
    assert later["held_out_perplexity"] < 0.7 * first["held_out_perplexity"]


def test_a_new_rwkv7_has_the_reference_script_s_values():
    """Of the first and the last channel, by hand; and a layer that is new adds nothing."""
    ranks = rwkv7_init.ranks(192)
    assert ranks == (32, 32, 32, 64) and rwkv7_init.ranks(2048) == (128, 128, 64, 224)
    model = RWKV7(RWKV7Sizes(50, 3, 192, 3, 96, *ranks))
    rwkv7_init.initialise(model)
    found = {name: (x.flatten()[0].item(), x.flatten()[-1].item()) for name, x in model.state_dict().items()}
    for layer in range(3):
        assert found[f"blocks.{layer}.att.w0"] == pytest.approx((-6 + 0.5 - 2.5, 0 + 0.5 + 2.5))
        assert found[f"blocks.{layer}.att.a0"] == pytest.approx((-0.19 - 0.3 - 0.2, -0.19 + 0.3 + 0.2))
        assert found[f"blocks.{layer}.att.k_k"] == pytest.approx((0.76, 0.66))
        assert found[f"blocks.{layer}.att.x_r"] == pytest.approx(
            (1, 1 - (191 / 192) ** (0.2 * (1 - layer / 3))), abs=1e-6
        )
        assert found[f"blocks.{layer}.ffn.x_k"] == pytest.approx(
            (1, 1 - (191 / 192) ** ((1 - layer / 3) ** 4)), abs=1e-6
        )
    assert found["blocks.1.att.v0"] == pytest.approx((0.93, 0.53))
    assert found["blocks.2.att.ln_x.weight"] == (1, 1)
    middle = model.state_dict()["blocks.1.att.w0"].flatten()[96].item()  # the second half of the second head
    assert middle == pytest.approx(-5.5 + 6 * (96 / 191) ** (1 + 0.5**0.3) + 2.5 * (1 / 63) ** 2)
    x = model.embed(torch.arange(20)[None])
    blocks = [model.blocks[0].ln0(x), model.hidden(x, model.zero_state(1))[0]]
    assert torch.allclose(model.ln_out(blocks[0]), blocks[1])


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
