"""A whole SpeechLM of random parts, and batches for it."""

import torch
from torch import Tensor

from rwkv_speech.batch import Batch, Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM

SEPARATOR_ID = 1 + ord("#")  # the vocabulary's ids are bytes + 1
EOS_ID = 0
TEXTS = [" the weather is good", "", "a", "ü 天気"]
LENGTHS = [3_000, 1_450, 300, 5_555]  # 9, 4, 0 and 17 frames


def build(parts: Parts, tasks: list[str] | None = None) -> SpeechLM:
    """Trained parts with values that matter; a new initial state would be zero."""
    model = SpeechLM.build(parts, task_names=tasks or ["asr"])
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    return model


def sounds(lengths: list[int]) -> list[Tensor]:
    """Noise of a different colour each, so that utterances differ to the encoder."""
    draw = torch.Generator().manual_seed(6)
    waves = []
    for i, length in enumerate(lengths):
        noise = torch.randn(length + 1, generator=draw)
        waves.append(0.1 * (noise[1:] + (i % 3 - 1) * noise[:-1]))
    return waves


def batch_of(model: SpeechLM, waves: list[Tensor], texts: list[str], tasks: list[str] | None = None) -> Batch:
    return collate(
        [
            Sample(str(i), wave, text, model.tokenizer.encode(text), len(wave) / 16_000, i, task)
            for i, (wave, text, task) in enumerate(zip(waves, texts, tasks or ["asr"] * len(waves), strict=True))
        ]
    )
