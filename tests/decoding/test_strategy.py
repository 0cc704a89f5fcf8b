import math

import pytest
import torch

from rwkv_speech.decoding.strategy import Hypothesis, Track, is_loop, measured

EOS = 0


def test_measured_gives_log_probabilities_and_entropies():
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    logprobs, entropies = measured(logits.bfloat16())
    oracle = torch.distributions.Categorical(logits=logits.bfloat16().double())
    torch.testing.assert_close(logprobs.double(), oracle.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), oracle.entropy(), rtol=0, atol=1e-5)
    assert measured(torch.zeros(1, 16))[1].item() == pytest.approx(math.log(16))


def test_a_track_ends_with_the_end_of_text_or_at_its_limit():
    track = Track(limit=2)
    assert track.append(7, -0.5, 1.0, EOS) is None and track.append(8, -0.25, 2.0, EOS) is None
    assert track.append(9, -4.0, 3.0, EOS) == Hypothesis((7, 8), (-0.5, -0.25), (1.0, 2.0), True)
    ended = track.append(EOS, -0.75, 0.5, EOS)
    assert ended == Hypothesis((7, 8), (-0.5, -0.25, -0.75), (1.0, 2.0, 0.5), False)
    assert ended.avg_logprob == -0.5


@pytest.mark.parametrize("length", range(1, 40))
def test_an_endless_repetition_is_cut_early_whatever_its_length(length: int):
    track = Track(limit=10_000)
    text = list(range(1000, 1013)) + 10_000 * list(range(1, length + 1))
    found = next(found for token in text if (found := track.append(token, 0.0, 0.0, EOS)))
    assert found.cut and len(found.ids) <= 13 + max(4 * length, 32) + 8


@pytest.mark.parametrize(
    "ids",
    [
        [5] * 24,  # ha ha ha
        [1, 2, 3] * 8,
        list(range(40)) * 3,
        [5] * 31 + [6],
        [i // 8 for i in range(400)],  # each word eight times, as some spell
    ],
)
def test_what_people_do_say_again_is_no_loop(ids: list[int]):
    assert not any(is_loop(ids[:n]) for n in range(len(ids) + 1))
