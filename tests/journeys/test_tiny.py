"""The embedded default: what its card says, and what a user does with it."""

import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rwkv_speech import tiny
from rwkv_speech.models.families import read_lm
from rwkv_speech.synthetic import corpus, pretrain_encoder, world
from rwkv_speech.synthetic.phones import LANGUAGES
from rwkv_speech.synthetic.rooms import augment
from rwkv_speech.tokenizer import WorldTokenizer

WEIGHTS = tiny.VOCAB_FILE.parent


def test_weights_are_small_and_described():
    files = [*tiny.BASE_MODELS.values(), tiny.ENCODER / "model.safetensors"]
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    card = (WEIGHTS / "CARD.md").read_text(encoding="utf-8")
    for file in files:
        count = sum(x.numel() for x in load_file(file).values())
        assert f"{count:,}" in card, file
    assert "demo/pretrain-tiny.sh" in card


def test_vocabulary_holds_the_words_of_the_corpus_and_of_the_world():
    tokenizer = WorldTokenizer(tiny.VOCAB_FILE)
    for words in (corpus.words(), *map(world.words, LANGUAGES)):
        ids = [tokenizer.encode(f" {word}") for word in words]
        assert [tokenizer.decode(found) for found in ids] == [f" {word}" for word in words]
        assert sum(map(len, ids)) <= 2.6 * len(words)
    assert tokenizer.encode("#") == [36]
    families = {name: read_lm(path) for name, path in tiny.BASE_MODELS.items()}
    assert {name: model.FAMILY for name, model in families.items()} == {"tiny": "x060", "tiny7": "x070"}
    assert {model.sizes.vocab for model in families.values()} == {tokenizer.vocab_size}


def test_corpus_has_150_words_and_repeats_for_a_seed():
    rng = random.Random(3)
    sentences = [corpus.sentence(rng) for _ in range(3000)]
    assert len({word for sentence in sentences for word in sentence.split()}) >= 150
    assert all(re.fullmatch("[a-z]+( [a-z]+){0,11}", sentence) for sentence in sentences)
    rng = random.Random(3)
    assert sentences[:50] == [corpus.sentence(rng) for _ in range(50)]


def test_augment_keeps_shape_and_adds_the_noise_it_says():
    g = torch.Generator().manual_seed(1)
    waveforms = torch.randn(4, 8000, generator=g)
    loud, faint = augment(waveforms, g, 1.0), augment(waveforms, g, 0.0)
    assert loud.shape == faint.shape == waveforms.shape and torch.isfinite(loud).all()
    assert (faint - waveforms).norm() < 0.05 * waveforms.norm() < (loud - waveforms).norm()


@pytest.mark.soak
def test_pretraining_of_the_encoder_writes_what_loads(tmp_path: Path):
    facts = pretrain_encoder.pretrain(pretrain_encoder.Flags(str(tmp_path), hours=0.02, epochs=1))
    assert all(0.0 <= facts[lang] <= 1.0 for lang in LANGUAGES)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(tiny.ENCODER / "model.safetensors").keys()
