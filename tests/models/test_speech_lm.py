"""The loss and its gradients, against each sequence written out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_rms_close
from speech_models import EOS_ID, LENGTHS, SEPARATOR_ID, TEXTS, batch_of, build, sounds
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech.batch import Batch, Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.reader import Reader, Reading
from rwkv_speech.errors import UserError
from rwkv_speech.models.families import read_lm
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.peft import LoraSpec
from rwkv_speech.models.speech_lm import SpeechLM


@pytest.fixture(scope="module")
def model(tiny_parts: Parts) -> SpeechLM:
    return build(tiny_parts)


def naive_loss(model: SpeechLM, wave: Tensor, text: str, task: str = "asr", prompt: str = "") -> Tensor:
    """One utterance, unpacked and unpadded, the adapter written out: the definition."""
    frames, [length] = model.encoder(wave[None], torch.tensor([len(wave)]))
    stack, adapter = model.adapter.stack, dict(model.adapter.named_parameters())
    tokens = [frames[0, i : i + stack].flatten() for i in range(0, int(length) - stack + 1, stack)]
    parts = [model.lm.emb(torch.tensor(model.tokenizer.encode(prompt), dtype=torch.int64))]
    if tokens:
        hidden = F.linear(torch.stack(tokens), adapter["0.weight"], adapter["0.bias"]).relu()
        parts.append(F.linear(hidden, adapter["2.weight"], adapter["2.bias"]))
    ids = model.tokenizer.encode(text)
    parts += [model.soft_prompts[task]] if task in model.soft_prompts else []
    parts.append(model.lm.emb(torch.tensor([SEPARATOR_ID, *ids])))
    state = model.lm.zero_state(1)._replace(wkv=model.initial_states[task][:, None])
    logits = model.lm(inputs_embeds=torch.cat(parts)[None], state=state).logits[0]
    return F.cross_entropy(logits[-len(ids) - 1 :], torch.tensor([*ids, EOS_ID]), reduction="sum")


def test_loss_equals_each_utterance_written_out(model: SpeechLM):
    waves = sounds(LENGTHS)
    batch = batch_of(model, waves, TEXTS)
    loss = model(batch)
    expected = sum(naive_loss(model, wave, text) for wave, text in zip(waves, TEXTS, strict=True))
    assert batch.num_targets == sum(len(model.tokenizer.encode(text)) + 1 for text in TEXTS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_prompts_stand_before_the_audio(model: SpeechLM):
    waves, prompts = sounds(LENGTHS), ["", "ü is", " good", "a"]
    samples = batch_of(model, waves, TEXTS).samples()
    prompted = [replace(x, prompt_ids=tuple(model.tokenizer.encode(y))) for x, y in zip(samples, prompts, strict=True)]
    each = zip(waves, TEXTS, ["asr"] * 4, prompts, strict=True)
    expected = sum(naive_loss(model, *row) for row in each)
    torch.testing.assert_close(model(collate(prompted)), expected, rtol=1e-5, atol=0)


def test_each_utterance_starts_from_its_own_tasks_state(tiny_parts: Parts):
    model = build(tiny_parts, ["asr", "st"])
    waves, tasks = sounds(LENGTHS), ["st", "asr", "asr", "st"]
    loss = model(batch_of(model, waves, TEXTS, tasks))
    each = zip(waves, TEXTS, tasks, strict=True)
    torch.testing.assert_close(loss, sum(naive_loss(model, *row) for row in each), rtol=1e-5, atol=0)
    loss.backward()
    assert all(state.grad is not None and state.grad.any() for state in model.initial_states.values())
    with pytest.raises(
        UserError, match=r"task 'qa': found no initial state of it, expected one of asr, st; .*--task qa"
    ):
        model(batch_of(model, waves, TEXTS, ["st", "asr", "qa", "st"]))


def test_a_state_that_no_utterance_has_takes_part_with_no_gradient(tiny_parts: Parts):
    """Ranks wait for the gradient of every tensor, and the optimizer's step is not to depend on how a batch was cut."""
    model = build(tiny_parts, ["asr", "st"])
    model(batch_of(model, sounds(LENGTHS), TEXTS, ["st"] * len(TEXTS))).backward()
    unused, used = model.initial_states["asr"].grad, model.initial_states["st"].grad
    assert unused is not None and not unused.any() and used is not None and used.any()


def naive_conversation_loss(model: SpeechLM, turns: list[Sample]) -> Tensor:
    """All turns unpacked, from one state: the definition."""
    embed, parts, targets = model.lm.emb, list[Tensor](), list[int]()
    for turn in turns:
        if turn.turn > 1:
            parts.append(embed(torch.tensor(model.tokenizer.encode("\n\n"))))
        if turn.input_ids is None:
            parts.append(model.audio_tokens(collate([replace(turn, turn=0)]))[0])
        else:
            parts.append(embed(torch.tensor(turn.input_ids)))
        parts.append(embed(torch.tensor([SEPARATOR_ID, *turn.ids])))
        targets += [-100] * (sum(map(len, parts)) - len(targets) - len(turn.ids) - 1) + [*turn.ids, EOS_ID]
    state = model.lm.zero_state(1)._replace(wkv=model.initial_states[turns[0].task][:, None])
    logits = model.lm(inputs_embeds=torch.cat(parts)[None], state=state).logits[0]
    return F.cross_entropy(logits, torch.tensor(targets), reduction="sum")


def test_turns_go_on_in_one_sequence(model: SpeechLM):
    a, b, c, d = batch_of(model, sounds(LENGTHS), TEXTS).samples()
    read = tuple(model.tokenizer.encode("what is it"))
    nothing = torch.empty(0)
    middle = replace(b, waveform=nothing, duration=0.0, input_ids=read, turn=2)
    talks = [[replace(a, turn=1), middle, replace(d, turn=3)], [c], [replace(d, turn=1), replace(a, turn=2)]]
    expected = [naive_conversation_loss(model, talk) for talk in talks]
    batch = collate([turn for talk in talks for turn in talk])
    torch.testing.assert_close(model(batch), sum(expected), rtol=1e-5, atol=0)
    again = collate(batch.samples())
    assert (
        (again.turns, again.input_ids)
        == (batch.turns, batch.input_ids)
        == ([1, 2, 3, 0, 1, 2], [None, read] + 4 * [None])
    )
    only_text = [replace(middle, turn=1), replace(middle, text="good", ids=model.tokenizer.encode("good"))]
    torch.testing.assert_close(model(collate(only_text)), naive_conversation_loss(model, only_text), rtol=1e-5, atol=0)


def test_a_soft_prompt_is_read_between_audio_and_separator(tiny_parts: Parts, tmp_path: Path):
    """Against the definition, for a task that has one beside one that has none; in training and in decoding."""
    model = build(tiny_parts, ["asr", "keyword", "topic"])
    model.add_soft_prompts(["keyword", "topic"], 3)
    model.add_soft_prompts(["topic"], 9)  # has one already
    waves, tasks = sounds(LENGTHS), ["topic", "asr", "keyword", "asr"]
    loss = model(batch_of(model, waves, TEXTS, tasks))
    each = zip(waves, TEXTS, tasks, strict=True)
    torch.testing.assert_close(loss, sum(naive_loss(model, *row) for row in each), rtol=1e-5, atol=0)
    loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in model.soft_prompts.values())
    [encoded] = Reader(model.eval()).encode([Sample("a", waves[1], "", [], 1.0, 0, "topic")])
    logits, _ = Reader(model).prefill([encoded], [Reading("topic")])
    separator = model.lm.embed(torch.tensor([SEPARATOR_ID]))
    embeds = torch.cat([encoded.audio, model.soft_prompts["topic"], separator])
    expected = model.lm(inputs_embeds=embeds[None], state=model.initial_state(["topic"])).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "a.safetensors")
    again = SpeechLM.from_pretrained(tmp_path / "a.safetensors")
    assert {name: x.tolist() for name, x in again.soft_prompts.items()} == {
        name: x.tolist() for name, x in model.soft_prompts.items()
    }


def test_but_for_the_states_of_some_tasks_all_can_be_frozen(tiny_parts: Parts):
    model = build(tiny_parts, ["asr", "keyword"])
    model.freeze_all_but(["keyword"])
    batch = batch_of(model, sounds(LENGTHS), TEXTS, ["keyword", "asr", "asr", "keyword"])
    loss = model(batch)
    loss.backward()
    assert [x is model.initial_states["keyword"] for x in model.trained_parameters()] == [True]
    assert {name for name, x in model.named_parameters() if x.grad is not None} == {"initial_states.keyword"}
    free = build(tiny_parts, ["asr", "keyword"])
    free(batch).backward()
    torch.testing.assert_close(model.initial_states["keyword"].grad, free.initial_states["keyword"].grad)


def test_loss_feels_the_audio_and_the_initial_state(model: SpeechLM):
    waves = sounds(LENGTHS)
    before = model(batch_of(model, waves, TEXTS))
    swapped = model(batch_of(model, waves[::-1], TEXTS))
    kept = model.initial_states["asr"].detach().clone()
    model.initial_states["asr"].data.zero_()
    stateless = model(batch_of(model, waves, TEXTS))
    model.initial_states["asr"].data.copy_(kept)
    assert abs(swapped - before) > 1e-3 * before and abs(stateless - before) > 1e-3 * before


def gradients(model: SpeechLM, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses' sum over batches, and what has a gradient after it."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(batch)
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
    names = {"initial_states.asr", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}
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
    assert changed == {"initial_states.asr", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}


@pytest.mark.parametrize("normalised", [False, True])
def test_a_training_step_never_waits_for_the_device(tiny_parts: Parts, normalised: bool):
    """On "meta" nothing has a value: whatever asked the device for one, or for a size, would fail."""
    model = build(tiny_parts).to("meta")
    loss = model(replace(batch_of(model, sounds(LENGTHS), TEXTS), normalised=normalised).to("meta"))
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.trained_parameters())


def naive_divergence(model: SpeechLM, wave: Tensor, ids: list[int], asked: list[int], temperature: float) -> Tensor:
    """KL from the frozen model that reads `asked` and then the text to the student, written out."""
    frames, [length] = model.encoder(wave[None], torch.tensor([len(wave)]))
    audio = model.adapter(frames, length[None])[0]
    embed = model.lm.emb(torch.tensor([SEPARATOR_ID, *ids]))
    state = model.lm.zero_state(1)._replace(wkv=model.initial_states["asr"][:, None])
    student = model.lm(inputs_embeds=torch.cat([audio, embed])[None], state=state).logits[0, len(audio) :]
    frozen = read_lm(model.parts.load_model)
    teacher = frozen(torch.tensor([asked + ids])).logits[0, len(asked) - 1 :].detach()
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    end = model.tokenizer.ids_with(b"\n\n")
    p = p.index_add(1, torch.tensor([EOS_ID] * len(end)), p[:, end]).index_fill(1, torch.tensor(end), 0.0)
    return temperature**2 * (torch.special.xlogy(p, p) - p * q.log()).sum()


@pytest.mark.parametrize("tuned", [{}, {"lora": LoraSpec(4, 6.0, "key,value"), "train_parts": "state_offset"}])
def test_answers_are_compared_with_the_frozen_model_that_reads_the_transcript(
    tuned: dict[str, Any], tiny_parts: Parts, tmp_path: Path
):
    vocab = Path(tiny_parts.vocab_file).read_text() + "261 '\\n\\n' 2\n262 '.\\n\\n' 3\n"
    (tmp_path / "vocab.txt").write_text(vocab)
    model = build(replace(tiny_parts, vocab_file=str(tmp_path / "vocab.txt"), **tuned))
    assert bool(tuned) == bool(model.tuned)
    waves, asked = sounds(LENGTHS), [(), (86, 59), (), (9, 10, 11)]
    batch = batch_of(model, waves, TEXTS)
    loss = model(replace(batch, teacher_ids=asked), kl_temperature=1.7)
    texts = [model.tokenizer.encode(text) for text in TEXTS]
    expected = sum(
        naive_divergence(model, wave, ids, list(prompt), 1.7) if prompt else naive_loss(model, wave, text)
        for wave, text, ids, prompt in zip(waves, TEXTS, texts, asked, strict=True)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    names, parameters = zip(*((name, x) for name, x in model.named_parameters() if x.requires_grad), strict=True)
    for name, got, want in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert_rms_close(name, got, want, 1e-4)
    assert all(x.teacher_ids == y for x, y in zip(replace(batch, teacher_ids=asked).samples(), asked, strict=True))
    assert collate(batch.samples()).teacher_ids is None
