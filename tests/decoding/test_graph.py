import pytest
import torch

from rwkv_speech.decoding.graph import StepGraph
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.state import State


def test_a_cpu_has_no_graph(model: SpeechLM):
    assert StepGraph.of(model.lm, model.lm.zero_state(2)) is None


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
