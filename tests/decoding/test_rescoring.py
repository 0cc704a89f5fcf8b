import itertools
import math

import pytest
import torch

from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.rescoring import log_prob, rank_of
from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.transcriber import Transcriber
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts

SPEC = CtcSpec("ab ")


@pytest.mark.parametrize(
    ("text", "labels"), [("ab", (1, 2)), ("aa", (1, 1)), ("b a", (2, 3, 1)), ("aB", (1, 2)), ("", ())]
)
def test_log_prob_sums_over_all_paths(text: str, labels: tuple[int, ...]):
    ctc = torch.randn(5, 4, generator=torch.Generator().manual_seed(len(text))).log_softmax(-1)
    total = 0.0
    for path in itertools.product(range(4), repeat=5):
        if tuple(x for x, _ in itertools.groupby(path) if x) == labels:
            total += math.exp(sum(float(ctc[t, x]) for t, x in enumerate(path)))
    assert log_prob(ctc, SPEC, text) == pytest.approx(math.log(total), abs=1e-4)


def test_a_text_of_more_characters_than_frames_is_impossible():
    assert log_prob(torch.zeros(2, 4).log_softmax(-1), SPEC, "abab") == -math.inf


def test_a_text_with_a_character_that_is_no_label_is_impossible():
    assert log_prob(torch.zeros(9, 4).log_softmax(-1), SPEC, "aXb") == -math.inf


@pytest.fixture(scope="module")
def model() -> SpeechLM:
    model = SpeechLM.build(Parts())
    model.ctc = CtcHead(model.encoder.width, CtcSpec("ab")).eval()
    return model


def test_what_is_heard_wins_over_what_is_likely(model: SpeechLM):
    ids = {text: tuple(model.tokenizer.encode(text)) for text in "ab"}
    likely, heard = (Hypothesis(ids[text], (), (), False, score) for text, score in (("a", -1.0), ("b", -1.5)))
    ctc = torch.tensor([[0.0, -3.0, 3.0]] * 3).log_softmax(-1)
    order = sorted([likely, heard], key=rank_of(model, "asr", ctc, 0.5), reverse=True)
    assert order == [heard, likely]
    for task, weight, given in (("asr", 0.0, ctc), ("st_fr", 0.5, ctc), ("asr", 0.5, None)):
        assert sorted([heard, likely], key=rank_of(model, task, given, weight), reverse=True) == [likely, heard]


def test_it_needs_a_head():
    with pytest.raises(UserError, match="--ctc_weight: the weights have no CTC head"):
        Transcriber(SpeechLM.build(Parts()), Options.given(ctc_weight=0.5), 1)
