from pathlib import Path

import pytest
import torch
from lm_cases import make_model
from tiny_models import RANDOM_TENSORS

from rwkv_speech.decoding.graph import StepGraph
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.state import State


def test_a_cpu_has_no_graph(model: SpeechLM):
    assert StepGraph.of(model.lm, model.lm.zero_state(2)) is None


@pytest.mark.parametrize("family", RANDOM_TENSORS)
def test_a_step_asks_the_device_for_no_number(family: str, tmp_path: Path):
    """A graph cannot hold that; on the meta device, where there are no numbers, it is an error."""
    lm = make_model(tmp_path, family).to("meta")
    logits = lm.step(torch.zeros(3, dtype=torch.int64, device="meta"), lm.zero_state(3))
    assert logits.shape == (3, lm.sizes.vocab)
    with pytest.raises(RuntimeError, match="meta tensors"):
        logits.argmax().item()


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_steps_equal_eager_ones(model: SpeechLM):
    lm = model.lm.to("cuda")
    state = lm.zero_state(3)
    graph = StepGraph.of(lm, state)
    assert graph is not None
    for x in state:
        x.normal_()
    other = State(*(x.clone() for x in state))
    for tokens in torch.randint(0, 250, (5, 3)):
        torch.testing.assert_close(graph.step(tokens), lm.step(tokens.cuda(), other))
    for x, y in zip(state, other, strict=True):
        torch.testing.assert_close(x, y)
    with torch.autocast("cuda", torch.bfloat16):
        assert StepGraph.of(lm, state) is None
    lm.to("cpu")
