"""A whole model with random weights that matter."""

import pytest
import torch

from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.parts import Parts


@pytest.fixture(scope="module")
def model(tiny_parts: Parts) -> SpeechLM:
    model = SpeechLM.build(tiny_parts)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    return model.eval()
