import math

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rwkv_speech.decoding import strategy as strategies
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.strategy import (
    Choice,
    Hypothesis,
    Strategy,
    Track,
    is_loop,
    measured,
    penalised,
    sample,
)

EOS = 0


def test_measured_gives_log_probabilities_and_entropies():
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    logprobs, entropies = measured(logits.bfloat16())
    oracle = torch.distributions.Categorical(logits=logits.bfloat16().double())
    torch.testing.assert_close(logprobs.double(), oracle.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), oracle.entropy(), rtol=0, atol=1e-5)
    assert measured(torch.zeros(1, 16))[1].item() == pytest.approx(math.log(16))


def test_a_text_ends_with_the_end_or_at_its_limit():
    strategy, track = Strategy(GREEDY, EOS), Track(limit=2)
    for token, logprob, entropy in ((7, -0.5, 1.0), (8, -0.25, 2.0)):
        assert strategy.take(track, Choice(token, logprob, logprob, entropy)) is None
    cut = strategy.take(track, Choice(9, -4.0, -4.0, 3.0))
    assert cut == Hypothesis((7, 8), (-0.5, -0.25), (1.0, 2.0), True, -0.375)
    ended = strategy.take(track, Choice(EOS, -0.75, -0.75, 0.5))
    assert ended == Hypothesis((7, 8), (-0.5, -0.25, -0.75), (1.0, 2.0, 0.5), False, -0.5)
    assert ended.avg_logprob == -0.5


def test_the_score_is_divided_as_in_whisper():
    for alpha, divisor in ((None, 3), (0.0, 1), (1.0, 8 / 6), (0.5, (8 / 6) ** 0.5)):
        strategy, track = Strategy(Options.given(0.0, length_penalty=alpha), EOS), Track(limit=9)
        for token in (5, 6):
            strategy.take(track, Choice(token, -2.0, -1.0, 0.0))
        ended = strategy.take(track, Choice(EOS, -2.0, -1.0, 0.0))
        assert ended and ended.score == pytest.approx(-6 / divisor) and ended.avg_logprob == -1


@pytest.mark.parametrize("length", range(1, 40))
def test_an_endless_repetition_is_cut_early_whatever_its_length(length: int):
    strategy, track = Strategy(GREEDY, EOS), Track(limit=10_000)
    text = list(range(1000, 1013)) + 10_000 * list(range(1, length + 1))
    found = next(found for token in text if (found := strategy.take(track, Choice(token, 0.0, 0.0, 0.0))))
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


TEXTS = [[], [5], [3, 3, 3, 9], [4, 5, 6, 4, 5, 7, 4, 5], list(range(20)) * 2]


def logits_for(rows: int) -> Tensor:
    return 3 * torch.randn(rows, 40, generator=torch.Generator().manual_seed(1))


def theirs(processor: LogitsProcessor, scores: Tensor, texts: list[list[int]]) -> Tensor:
    """Row by row: they want texts of one length."""
    rows = [
        processor(torch.tensor([text], dtype=torch.int64), row[None]) for text, row in zip(texts, scores, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_transformers(penalty: float):
    logits = logits_for(len(TEXTS))
    found = penalised(logits, TEXTS, Options.given(0.0, repetition_penalty=penalty))
    torch.testing.assert_close(found, theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, TEXTS))
    assert torch.equal(logits, logits_for(len(TEXTS)))  # which are left as they were


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngram_is_transformers(size: int):
    logits = logits_for(len(TEXTS))
    found = penalised(logits, TEXTS, Options.given(0.0, no_repeat_ngram_size=size))
    assert torch.equal(found[1:], theirs(NoRepeatNGramLogitsProcessor(size), logits[1:], TEXTS[1:]))
    assert torch.equal(found[0], logits[0])


def test_presence_and_frequency_penalties_are_as_openai_writes_them():
    logits = logits_for(len(TEXTS))
    options = Options.given(0.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    for row, text in enumerate(TEXTS):
        for token in range(40):
            expected[row, token] -= 0.25 * text.count(token) + 0.5 * (text.count(token) > 0)
    torch.testing.assert_close(penalised(logits, TEXTS, options), expected)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.4, 7, 1.0), (1.5, 0, 0.6), (0.8, 9, 0.7)]
)
def test_samples_have_the_distribution_of_transformers_filters(temperature: float, top_k: int, top_p: float):
    scores = logits_for(3)
    filtered = TemperatureLogitsWarper(temperature)(None, scores)
    filtered = TopKLogitsWarper(top_k)(None, filtered) if top_k else filtered
    expected = (TopPLogitsWarper(top_p)(None, filtered) if top_p < 1 else filtered).softmax(-1)
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # every part of [0, 1) alike
    for row, wanted in zip(scores, expected, strict=True):
        tokens = sample(row.expand(len(draws), -1), torch.full((len(draws),), temperature), draws, top_k, top_p)
        found = tokens.bincount(minlength=40) / len(draws)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        assert not found[wanted == 0].any()


def test_a_sample_is_the_same_in_any_batch():
    scores, draws = logits_for(6), torch.rand(6, generator=torch.Generator().manual_seed(2)).double()
    temperatures = torch.tensor([0.2, 0.5, 1.0, 1.0, 2.0, 0.7])
    together = sample(scores, temperatures, draws, 10, 0.9)
    alone = [sample(scores[i : i + 1], temperatures[i : i + 1], draws[i : i + 1], 10, 0.9) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


def test_the_ends_of_the_unit_interval_give_tokens_that_may_come():
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(scores, torch.ones(2), draws).tolist() == [1, 2]


def test_a_text_that_transcribes_first_is_split_at_its_first_separator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategies, "_HEARD_TOKENS", 3)  # though the answer may have but two
    strategy, track, seen = Strategy(GREEDY, EOS), Track(limit=2, separator=5), list[list[int]]()
    for token in (7, 8, 5, 9, 5):
        assert strategy.take(track.fork(), Choice(EOS, 0.0, 0.0, 0.0)) is not None  # which leaves the track as it is
        assert strategy.take(track, Choice(token, -float(token), -float(token), 1.0)) is None
        seen.append(track.answer)
    assert seen == [[], [], [], [9], [9, 5]]
    cut = strategy.take(track, Choice(6, -1.0, -1.0, 0.0))
    assert cut == Hypothesis((9, 5), (-9.0, -5.0), (1.0, 1.0), True, -34 / 5, (7, 8))
    ended = strategy.take(track, Choice(EOS, -2.0, -2.0, 0.5))
    assert ended == Hypothesis((9, 5), (-9.0, -5.0, -2.0), (1.0, 1.0, 0.5), False, -36 / 6, (7, 8))
    unanswered = Track(limit=2, separator=5)
    for token in (7, 8, 9):
        assert strategy.take(unanswered, Choice(token, -1.0, -1.0, 1.0)) is None
    assert strategy.take(unanswered, Choice(6, -1.0, -1.0, 1.0)) == Hypothesis((), (), (), True, -1.0, (7, 8, 9))


def test_penalties_are_of_what_was_heard_and_of_the_answer_each_alone():
    options = Options.given(0.0, presence_penalty=1.0)
    strategy, logits = Strategy(options, EOS), torch.zeros(1, 12)
    whole, answer = Track(9, ids=[7, 8, 5, 9], separator=5, start=3), Track(9, ids=[9])
    assert torch.equal(strategy.scores(logits, [whole]).scores, strategy.scores(logits, [answer]).scores)
