"""What part the CTC head takes in the choice of a text: in each step of a beam search, and among samples."""

# F frames · K labels of the CTC head

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rwkv_speech import tasks
from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.models.ctc import BLANK, CtcSpec
from rwkv_speech.models.speech_lm import SpeechLM

Rank = Callable[[Hypothesis], tuple[float, float]]  # the higher the better


def by_score(text: Hypothesis) -> tuple[float, float]:
    """The order in which a search found the texts likely."""
    return text.score, 0.0


def is_spoken(task: str) -> bool:
    """Whether a text of this task is what is said: nothing else can be heard."""
    return tasks.base_of(task) == tasks.DEFAULT


def rank_of(model: SpeechLM, task: str, ctc: Tensor | None, weight: float) -> Rank:
    """The order of samples of a piece with log-probabilities `ctc` (F, K).

    Source: joint CTC/attention decoding, Watanabe et al. 2017, in its rescoring form.
    """
    head = model.ctc
    if not weight or head is None or ctc is None or not is_spoken(task):
        return by_score

    def rank(text: Hypothesis) -> tuple[float, float]:
        heard = log_prob(ctc, head.spec, model.tokenizer.decode(text.ids))
        return text.score + weight * heard / max(1, len(text.ids)), text.score

    return rank


def log_prob(ctc: Tensor, spec: CtcSpec, text: str) -> float:
    """The log-probability of a text's characters in (F, K); -inf of too many, and of one that is no label."""
    labels = torch.tensor(spec.encode(text), dtype=torch.int64)
    if spec.star in labels:
        return -math.inf
    sizes = torch.tensor([len(ctc)]), torch.tensor([len(labels)])
    return -float(functional.ctc_loss(ctc[:, None].float(), labels[None], *sizes, blank=BLANK, reduction="sum"))
