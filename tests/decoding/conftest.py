"""A whole model with random weights that matter."""

from collections.abc import Callable, Iterator

import pytest
import torch

from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.parts import Parts


@pytest.fixture(scope="module")
def family() -> str:
    """The language model's, which a module may set to several."""
    return "x060"


@pytest.fixture(scope="module")
def model(tiny_parts: Parts, rwkv7_parts: Parts, family: str) -> SpeechLM:
    model = SpeechLM.build(rwkv7_parts if family == "x070" else tiny_parts)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    return model.eval()


@pytest.fixture
def restrict(model: SpeechLM) -> Iterator[Callable[[dict[int, float]], SpeechLM]]:
    """The model that knows certain tokens alone, each with a bias: a channel that is always 1 gives the others -100."""
    lm = model.lm
    kept = [x.detach().clone() for x in (lm.ln_out.weight, lm.ln_out.bias, lm.head.weight)]

    def change(biases: dict[int, float]) -> SpeechLM:
        with torch.no_grad():
            lm.ln_out.weight[0], lm.ln_out.bias[0] = 0.0, 1.0
            lm.head.weight[:, 0] = -100.0
            for token, bias in biases.items():
                lm.head.weight[token, 0] = bias
        return model

    yield change
    with torch.no_grad():
        for x, old in zip((lm.ln_out.weight, lm.ln_out.bias, lm.head.weight), kept, strict=True):
            x.copy_(old)
