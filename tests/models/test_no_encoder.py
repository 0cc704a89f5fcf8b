"""A model that only reads text: no encoder is there, and what it reads means the same as to one that can hear."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_speech.batch import Batch, Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import export_published, load_trained
from rwkv_speech.models.parts import Parts

TEXTS = {"what is it": " the weather", "is it good": " good"}


def reading(model: SpeechLM) -> Batch:
    encode = model.tokenizer.encode
    return collate(
        [
            Sample(read, torch.empty(0), text, encode(text), 0.0, number, "asr", input_ids=tuple(encode(read)))
            for number, (read, text) in enumerate(TEXTS.items())
        ]
    )


def test_without_its_encoder_a_checkpoint_reads_the_same(tiny_parts: Parts, tmp_path: Path):
    torch.manual_seed(3)
    model = SpeechLM.build(tiny_parts)
    torch.nn.init.normal_(model.initial_states["asr"])
    model.parts = replace(model.parts, encoder="/gone/encoder")
    model.save(tmp_path / "best.safetensors")
    with pytest.raises(UserError, match=r"its /gone/encoder is neither there nor .*--encoder"):
        SpeechLM.from_pretrained(tmp_path)
    reader = SpeechLM.from_pretrained(tmp_path, hears=False)
    assert not list(reader.encoder.parameters()) and reader.parts == model.parts
    assert reader.adapter_sha256 == model.adapter_sha256  # states and sessions are known by it
    losses = []
    for each in (model, reader):
        loss = each(reading(each))
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    assert torch.equal(*(each.initial_states["asr"].grad for each in (model, reader)))
    answers = [each.eval().session().say("what is it", max_new_tokens=5) for each in (model, reader)]
    assert answers[0] == answers[1] and len(answers[0].tokens) > 1
    with pytest.raises(UserError, match="found audio for a model that was loaded to read text alone"):
        reader.transcribe(torch.zeros(16_000), vad="none")
    reader.save(tmp_path / "again.safetensors")
    tensors, again = (load_trained(tmp_path / f"{name}.safetensors").named_tensors() for name in ("best", "again"))
    assert tensors.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in tensors.items())


def test_weights_that_never_heard_have_no_adapter(tiny_parts: Parts, tmp_path: Path):
    model = SpeechLM.build(replace(tiny_parts, encoder="no/such-encoder"), hears=False)
    model(reading(model)).backward()
    assert {name for name, _ in model.named_parameters() if not name.startswith("lm.")} == {"initial_states.asr"}
    model.save(tmp_path / "best.safetensors")
    assert list(load_trained(tmp_path / "best.safetensors").named_tensors()) == ["initial_states.asr"]
    assert SpeechLM.from_pretrained(tmp_path, hears=False).adapter_sha256 == ""
    with pytest.raises(UserError, match=r"best\.safetensors: has no adapter, for it was trained with --input text"):
        SpeechLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no adapter"):
        export_published(load_trained(tmp_path / "best.safetensors"), tmp_path / "a.pth")
