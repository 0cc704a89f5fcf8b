from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_models import random_rwkv6_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_speech.batch import Prepared
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import export_published, load_trained
from rwkv_speech.models.speech_lm import Parts, SpeechLM

SEPARATOR_ID = 1 + ord("#")  # the vocabulary's ids are bytes + 1
EOS_ID = 0
TEXTS = [" the weather is good", "", "a", "ü 天気"]
LENGTHS = [3_000, 1_450, 300, 5_555]  # 9, 4, 0 and 17 frames


def build(parts: Parts) -> SpeechLM:
    """Trained parts with values that matter; a new initial state would be zero."""
    model = SpeechLM.build(parts)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def model(tiny_parts: Parts) -> SpeechLM:
    return build(tiny_parts)


def sounds(lengths: list[int]) -> list[Tensor]:
    """Noise of a different colour each, so that utterances differ to the encoder."""
    draw = torch.Generator().manual_seed(6)
    waves = []
    for i, length in enumerate(lengths):
        noise = torch.randn(length + 1, generator=draw)
        waves.append(0.1 * (noise[1:] + (i % 3 - 1) * noise[:-1]))
    return waves


def batch_of(model: SpeechLM, waves: list[Tensor], texts: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors that `loss_sum` takes."""
    ids = [model.tokenizer.encode(text) for text in texts]
    return (
        nn.utils.rnn.pad_sequence(waves, batch_first=True),
        torch.tensor([len(wave) for wave in waves]),
        torch.tensor([i for row in ids for i in row], dtype=torch.int64),
        torch.tensor([len(row) for row in ids]),
    )


def naive_loss(model: SpeechLM, wave: Tensor, text: str) -> Tensor:
    """One utterance, unpacked and unpadded, the adapter written out: the definition."""
    frames, [length] = model.encoder(wave[None], torch.tensor([len(wave)]))
    stack, adapter = model.adapter.stack, dict(model.adapter.named_parameters())
    tokens = [frames[0, i : i + stack].flatten() for i in range(0, int(length) - stack + 1, stack)]
    parts = []
    if tokens:
        hidden = F.linear(torch.stack(tokens), adapter["0.weight"], adapter["0.bias"]).relu()
        parts = [F.linear(hidden, adapter["2.weight"], adapter["2.bias"])]
    ids = model.tokenizer.encode(text)
    parts.append(model.lm.emb(torch.tensor([SEPARATOR_ID, *ids])))
    state = model.lm.zero_state(1)._replace(wkv=model.time_state[:, None])
    logits = model.lm(inputs_embeds=torch.cat(parts)[None], state=state).logits[0]
    return F.cross_entropy(logits[len(tokens) :], torch.tensor([*ids, EOS_ID]), reduction="sum")


def test_loss_sum_equals_each_utterance_written_out(model: SpeechLM):
    waves = sounds(LENGTHS)
    loss, count = model.loss_sum(*batch_of(model, waves, TEXTS))
    expected = sum(naive_loss(model, wave, text) for wave, text in zip(waves, TEXTS, strict=True))
    assert count == sum(len(model.tokenizer.encode(text)) + 1 for text in TEXTS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_loss_sum_feels_the_audio_and_the_initial_state(model: SpeechLM):
    waves = sounds(LENGTHS)
    before, _ = model.loss_sum(*batch_of(model, waves, TEXTS))
    swapped, _ = model.loss_sum(*batch_of(model, waves[::-1], TEXTS))
    kept = model.time_state.detach().clone()
    model.time_state.data.zero_()
    stateless, _ = model.loss_sum(*batch_of(model, waves, TEXTS))
    model.time_state.data.copy_(kept)
    assert abs(swapped - before) > 1e-3 * before and abs(stateless - before) > 1e-3 * before


def gradients(
    model: SpeechLM, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses' sum over batches, and what has a gradient after it."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss, _ = model.loss_sum(*batch)
        loss.backward()
        total += loss.detach()
    return total, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def test_loss_and_gradients_do_not_depend_on_the_batch(model: SpeechLM):
    waves = sounds(LENGTHS)
    together, grads = gradients(model, [batch_of(model, waves, TEXTS)])
    rows = [[0, 3], [2], [1]]
    apart, sums = gradients(model, [batch_of(model, [waves[i] for i in row], [TEXTS[i] for i in row]) for row in rows])
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(sums[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


def test_gradients_exist_for_the_adapter_and_the_state_only(model: SpeechLM):
    names = {"time_state", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}
    _, grads = gradients(model, [batch_of(model, sounds(LENGTHS), TEXTS)])
    assert set(grads) == names and all(grad.abs().max() > 0 for grad in grads.values())
    assert {name for name, x in model.named_parameters() if x.requires_grad} == names
    trained = {id(x) for x in model.trained_parameters()}
    assert trained == {id(x) for name, x in model.named_parameters() if name in names}


def test_a_training_step_leaves_the_frozen_parts_as_they_were(tiny_parts: Parts):
    model = build(tiny_parts).train()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.trained_parameters(), lr=0.1)
    gradients(model, [batch_of(model, sounds(LENGTHS), TEXTS)])
    optimizer.step()
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert changed == {"time_state", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}


@pytest.mark.parametrize("normalised", [False, True])
def test_a_training_step_never_waits_for_the_device(
    tiny_parts: Parts, normalised: bool, monkeypatch: pytest.MonkeyPatch
):
    """On "meta" nothing has a value: whatever asked the device for one, or for a size, would fail."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which "meta" does not know
    model = build(tiny_parts).to("meta")
    waveforms, *on_the_host = batch_of(model, sounds(LENGTHS), TEXTS)
    loss, count = model.loss_sum(waveforms.to("meta"), *on_the_host, Prepared(normalised=normalised))
    loss.backward()
    assert (loss.device.type, count) == ("meta", sum(len(model.tokenizer.encode(text)) + 1 for text in TEXTS))
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.trained_parameters())


def test_generate_equals_reading_the_whole_prefix_again(model: SpeechLM):
    waves = sounds(LENGTHS)
    waveforms, num_samples, _, _ = batch_of(model, waves, TEXTS)
    found, _ = model.generate(waveforms, num_samples, max_new_tokens=6)
    for wave, ids in zip(waves, found, strict=True):
        audio, _ = model.audio_tokens(wave[None], torch.tensor([len(wave)]))
        for length in range(len(ids)):
            prefix = model.lm.emb(torch.tensor([SEPARATOR_ID, *ids[:length]]))
            state = model.lm.zero_state(1)._replace(wkv=model.time_state[:, None])
            logits = model.lm(inputs_embeds=torch.cat((audio, prefix))[None], state=state).logits
            assert int(logits[0, -1].argmax()) == ids[length]


def test_generate_of_no_utterance_is_nothing(model: SpeechLM):
    assert model.generate(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)) == ([], [])


def test_transcribe_of_a_batch_equals_each_alone_in_order(model: SpeechLM):
    waves = sounds([3_000, 0, 6_000, 399, 1_450, 5_555, 2_000])
    together = model.transcribe(waves, batch_size=3, max_new_tokens=8)
    alone = [model.transcribe([wave], max_new_tokens=8)[0] for wave in waves]
    assert together == alone and together == model.transcribe(waves, batch_size=100, max_new_tokens=8)
    assert [transcript.seconds for transcript in together] == [len(wave) / 16_000 for wave in waves]
    for transcript in together:
        assert transcript.text == model.tokenizer.decode(transcript.ids)
    assert len({tuple(transcript.ids) for transcript in together}) > 2  # else order would not show


def test_transcribe_of_nothing(model: SpeechLM):
    assert model.transcribe([]) == []
    [heard] = model.transcribe([torch.zeros(0)])
    assert heard.seconds == 0 and isinstance(heard.text, str)
    assert model.transcribe([torch.zeros(0), torch.zeros(0)], max_new_tokens=3)[1].ids == heard.ids[:3]


def test_transcribe_reads_files(model: SpeechLM, tmp_path: Path):
    wave = sounds([3_000])[0]
    soundfile.write(tmp_path / "a.wav", wave.numpy(), 16_000, subtype="FLOAT")
    assert model.transcribe([tmp_path / "a.wav"]) == model.transcribe([wave])


def test_transcribe_stops_at_a_rate_no_speaker_reaches(model: SpeechLM):
    waves = sounds([1_000, 32_000])
    for transcript, limit in zip(model.transcribe(waves), (16, 50), strict=True):
        assert len(transcript.ids) == limit if transcript.cut else len(transcript.ids) <= limit


def heard_by(model: SpeechLM) -> tuple[list[list[int]], list[bool]]:
    waveforms, num_samples, _, _ = batch_of(model, sounds(LENGTHS), TEXTS)
    return model.generate(waveforms, num_samples, max_new_tokens=8)


def test_save_and_from_pretrained_give_the_same_model(model: SpeechLM, tmp_path: Path):
    model.save(tmp_path / "best.safetensors", wer=0.5)
    for path in (tmp_path, tmp_path / "best.safetensors"):
        again = SpeechLM.from_pretrained(path)
        for (name, x), (other, y) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert name == other and torch.equal(x, y)
        assert again.origin == model.origin and heard_by(again) == heard_by(model)
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
    moved.write_bytes(Path(model.origin.base_model).read_bytes())
    again = SpeechLM.from_pretrained(tmp_path / "last.safetensors", Parts(load_model=str(moved)))
    assert again.origin.base_model == str(moved) and heard_by(again) == heard_by(model)


def published(model: SpeechLM, folder: Path) -> Path:
    model.save(folder / "own" / "last.safetensors")
    export_published(load_trained(folder / "own" / "last.safetensors"), folder / "asr.pth")
    return folder / "asr.pth"


def test_from_pretrained_of_a_published_file_needs_its_base_model(model: SpeechLM, tmp_path: Path):
    with pytest.raises(UserError, match=r"asr\.pth: .*--load_model"):
        SpeechLM.from_pretrained(published(model, tmp_path))


def test_from_pretrained_of_a_published_file_equals_the_own_one(model: SpeechLM, tmp_path: Path, tiny_parts: Parts):
    again = SpeechLM.from_pretrained(published(model, tmp_path), tiny_parts)
    assert heard_by(again) == heard_by(model)


def test_from_pretrained_names_the_tensors_that_do_not_fit(model: SpeechLM, tmp_path: Path, tiny_parts: Parts):
    path = published(model, tmp_path)
    with pytest.raises(UserError, match=r"0\.weight: found \(16, 48\), expected \(16, 72\)") as caught:
        SpeechLM.from_pretrained(path, replace(tiny_parts, stack=3))
    assert str(path) in str(caught.value) and "0.bias" not in str(caught.value)
    with pytest.raises(UserError, match=r"0\.bias: found \(16,\), expected \(8,\)"):
        SpeechLM.from_pretrained(path, replace(tiny_parts, adapter_hidden=8))


def test_load_trained_names_a_state_of_another_depth(model: SpeechLM, tmp_path: Path):
    trained = load_trained(published(model, tmp_path))
    with pytest.raises(UserError, match="time_state: found"):
        model.load_trained(replace(trained, time_state=trained.time_state[:-1]))


def test_build_refuses_a_vocabulary_larger_than_the_model(tiny_parts: Parts, tmp_path: Path):
    torch.save(random_rwkv6_tensors(vocab=200), tmp_path / "small.pth")
    with pytest.raises(UserError, match="found 200 embeddings.*--vocab_file"):
        SpeechLM.build(replace(tiny_parts, load_model=str(tmp_path / "small.pth")))


def test_build_refuses_a_separator_of_several_tokens(tiny_parts: Parts):
    with pytest.raises(UserError, match="--separator: '##' is 2 tokens"):
        SpeechLM.build(replace(tiny_parts, separator="##"))


def test_build_starts_from_no_memory_and_names_its_parts(tiny_parts: Parts):
    model = SpeechLM.build(tiny_parts)
    assert not model.time_state.any() and model.separator_id == SEPARATOR_ID
    assert (model.origin.stack, model.origin.adapter_hidden) == (2, 16)
    assert (model.origin.base_model, model.origin.encoder) == (tiny_parts.load_model, tiny_parts.encoder)
    assert Parts().filled().load_model == "tiny"
    assert Parts(load_model="x.pth").filled() == Parts("x.pth", "microsoft/wavlm-large", "", 5, 2048)
