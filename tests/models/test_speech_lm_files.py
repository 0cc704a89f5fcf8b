"""Models built of files, saved, and found again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from speech_models import LENGTHS, SEPARATOR_ID, TEXTS, batch_of, build, sounds
from tiny_models import random_rwkv6_tensors
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import export_published, load_trained
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM


@pytest.fixture(scope="module")
def model(tiny_parts: Parts) -> SpeechLM:
    return build(tiny_parts)


def logits_of(model: SpeechLM) -> Tensor:
    audio, lengths = model.audio_tokens(batch_of(model, sounds(LENGTHS), TEXTS))
    state = model.initial_state(["asr"] * len(lengths))
    logits, _ = model.prefill(audio, [model.prefix(n, "asr") for n in lengths.tolist()], state)
    return logits


def test_save_and_from_pretrained_give_the_same_model(model: SpeechLM, tmp_path: Path):
    model.save(tmp_path / "best.safetensors", wer=0.5)
    for path in (tmp_path, tmp_path / "best.safetensors"):
        again = SpeechLM.from_pretrained(path)
        for (name, x), (other, y) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert name == other and torch.equal(x, y)
        assert again.parts == model.parts and torch.equal(logits_of(again), logits_of(model))
        assert not again.training
    assert load_trained(tmp_path / "best.safetensors").metrics == {"wer": 0.5}


@pytest.fixture
def other_base(tmp_path: Path) -> str:
    torch.save(random_rwkv6_tensors(seed=1), tmp_path / "other.pth")
    return str(tmp_path / "other.pth")


def test_from_pretrained_refuses_another_base_model(model: SpeechLM, tmp_path: Path, other_base: str):
    model.save(tmp_path / "run" / "last.safetensors")
    with pytest.raises(UserError, match="SHA-256") as caught:
        SpeechLM.from_pretrained(tmp_path / "run", Parts(load_model=other_base))
    assert "last.safetensors" in str(caught.value) and other_base in str(caught.value)
    assert "--load_model" in str(caught.value)


def test_from_pretrained_takes_the_same_base_model_elsewhere(model: SpeechLM, tmp_path: Path):
    model.save(tmp_path / "last.safetensors")
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(model.parts.load_model).read_bytes())
    again = SpeechLM.from_pretrained(tmp_path / "last.safetensors", Parts(load_model=str(moved)))
    assert again.parts.load_model == str(moved) and torch.equal(logits_of(again), logits_of(model))


def test_a_moved_run_finds_its_parts_beside_it(tiny_parts: Parts, tmp_path: Path):
    """Whatever folder it was trained from; the base model is known by its SHA-256."""
    here = tmp_path / "here"
    here.mkdir()
    for name in (tiny_parts.load_model, tiny_parts.vocab_file):
        (here / Path(name).name).write_bytes(Path(name).read_bytes())
    parts = replace(tiny_parts, load_model=str(here / "base.pth"), vocab_file=str(here / "vocab.txt"))
    model = build(parts)
    model.save(here / "last.safetensors")
    there = (tmp_path / "here").rename(tmp_path / "there")
    again = SpeechLM.from_pretrained(there)
    assert again.parts.load_model == str(there / "base.pth") and torch.equal(logits_of(again), logits_of(model))
    torch.save(random_rwkv6_tensors(seed=1), there / "base.pth")
    with pytest.raises(UserError, match="SHA-256 .*: give its path with --load_model"):
        SpeechLM.from_pretrained(there)
    (there / "vocab.txt").unlink()
    with pytest.raises(UserError, match="--vocab_file"):
        SpeechLM.from_pretrained(there, Parts(load_model=tiny_parts.load_model))


def test_a_size_that_contradicts_the_file_names_the_flag(tiny_parts: Parts):
    with pytest.raises(UserError, match=r"--n_embd: given 64, but .*base\.pth has 128"):
        SpeechLM.build(replace(tiny_parts, n_embd=64))


def published(model: SpeechLM, folder: Path) -> Path:
    model.save(folder / "own" / "last.safetensors")
    export_published(load_trained(folder / "own" / "last.safetensors"), folder / "asr.pth")
    return folder / "asr.pth"


def test_from_pretrained_of_a_published_file_needs_its_base_model(model: SpeechLM, tmp_path: Path):
    with pytest.raises(UserError, match=r"asr\.pth: .*--load_model"):
        SpeechLM.from_pretrained(published(model, tmp_path))


def test_from_pretrained_of_a_published_file_equals_the_own_one(model: SpeechLM, tmp_path: Path, tiny_parts: Parts):
    again = SpeechLM.from_pretrained(published(model, tmp_path), tiny_parts)
    assert torch.equal(logits_of(again), logits_of(model))


def test_from_pretrained_names_the_tensors_that_do_not_fit(model: SpeechLM, tmp_path: Path, tiny_parts: Parts):
    path = published(model, tmp_path)
    with pytest.raises(UserError, match=r"0\.weight: found \(16, 48\), expected \(16, 72\)") as caught:
        SpeechLM.from_pretrained(path, replace(tiny_parts, stack=3))
    assert str(path) in str(caught.value) and "0.bias" not in str(caught.value)
    with pytest.raises(UserError, match=r"0\.bias: found \(16,\), expected \(8,\)"):
        SpeechLM.from_pretrained(path, replace(tiny_parts, adapter_hidden=8))


def test_load_trained_names_a_state_of_another_depth(model: SpeechLM, tmp_path: Path):
    trained = load_trained(published(model, tmp_path))
    with pytest.raises(UserError, match=r"initial_states\.asr: found"):
        model.load_trained(replace(trained, initial_states={"asr": trained.initial_states["asr"][:-1]}))


def test_build_refuses_a_vocabulary_larger_than_the_model(tiny_parts: Parts, tmp_path: Path):
    torch.save(random_rwkv6_tensors(vocab=200), tmp_path / "small.pth")
    with pytest.raises(UserError, match="found 200 embeddings.*--vocab_file"):
        SpeechLM.build(replace(tiny_parts, load_model=str(tmp_path / "small.pth")))


def test_build_refuses_a_separator_of_several_tokens(tiny_parts: Parts):
    with pytest.raises(UserError, match="--separator: '##' is 2 tokens"):
        SpeechLM.build(replace(tiny_parts, separator="##"))


def test_build_starts_from_no_memory_and_names_its_parts(tiny_parts: Parts):
    model = SpeechLM.build(tiny_parts)
    assert not model.initial_states["asr"].any() and model.separator_id == SEPARATOR_ID
    assert (model.parts.stack, model.parts.adapter_hidden) == (2, 16)
    assert (model.parts.load_model, model.parts.encoder) == (tiny_parts.load_model, tiny_parts.encoder)
    assert Parts().filled().load_model == "tiny"
    assert Parts(load_model="x.pth").filled() == Parts("x.pth", "microsoft/wavlm-large", "", 5, 2048, "#")


def test_ctc_head_travels_with_the_checkpoint_and_trains_not(tiny_parts: Parts, tmp_path: Path):
    model = build(tiny_parts)
    trained = sum(1 for _ in model.trained_parameters())
    torch.manual_seed(0)
    model.ctc = CtcHead(model.encoder.width, CtcSpec(" abc", hidden=8)).eval().requires_grad_(False)
    assert sum(1 for _ in model.trained_parameters()) == trained
    model.save(tmp_path / "x.safetensors")
    found = SpeechLM.from_pretrained(tmp_path / "x.safetensors")
    batch = batch_of(model, sounds(LENGTHS), TEXTS)
    texts = found.ctc_texts(batch)
    assert texts == model.ctc_texts(batch) and any(texts) and texts[2] == ""
    frames, lengths = model.encoder(batch.waveforms, batch.num_samples)
    assert model.ctc_texts(replace(batch, frames=frames, frame_lengths=lengths)) == texts
