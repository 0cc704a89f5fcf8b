"""Beam search against brute force, and against a plain one that reads everything again."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from sounds import samples, sounds

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.state import State

LENGTHS = [3_000, 6_000, 1_450, 5_555, 2_000]
TOY = {0: 1.5, 98: 1.0, 99: 1.0, 101: 1.0}  # the end and three letters
LETTERS = {0: 1.0} | dict.fromkeys(range(98, 124), 0.0)

Restrict = Callable[[dict[int, float]], SpeechLM]


@torch.no_grad()
def read(model: SpeechLM, sample: Sample, ids: Sequence[int]) -> tuple[list[float], State]:
    """Log-probabilities (V) of the token after the ids, and the state after them."""
    audio, _ = model.audio_tokens(collate([sample]))
    text = model.lm.embed(torch.tensor([model.separator_id, *ids]))
    output = model.lm(inputs_embeds=torch.cat((audio, text))[None], state=model.initial_state([sample.task]))
    return output.logits[0, -1].double().log_softmax(-1).tolist(), output.state


def normalised(total: float, length: int, alpha: float | None) -> float:
    return total / (max(1, length) if alpha is None else ((5 + max(1, length)) / 6) ** alpha)


def plain_beam(
    model: SpeechLM, sample: Sample, limit: int, width: int, patience: float, alpha: float | None
) -> list[tuple[tuple[int, ...], bool, float]]:
    """Texts, whether they are cut, and their scores: whisper's search, a list of (total, ids) and nothing else."""
    beams, finished = [(0.0, ())], list[tuple[tuple[int, ...], bool, float]]()
    most = max(1, round(width * patience))
    while True:
        every = []
        for total, ids in beams:
            following, _ = read(model, sample, ids)
            every += [(total + score, (*ids, token)) for token, score in enumerate(following)]
        every.sort(reverse=True)
        grown = list[tuple[float, tuple[int, ...]]]()
        full = len(beams[0][1]) >= limit
        for total, ids in every[: 2 * width]:
            if (len(grown) == width and not full) or len(finished) == most:
                break
            if ids[-1] == 0:
                finished.append((ids[:-1], False, normalised(total, len(ids), alpha)))
            else:
                grown.append((total, ids))
        if len(finished) >= most or full:
            left = sorted(beams, reverse=True)[: max(0, width - len(finished))]
            finished += [(ids, True, normalised(total, len(ids), alpha)) for total, ids in left]
            return sorted(finished, key=lambda found: -found[2])
        beams = grown


def decode(model: SpeechLM, chosen: list[Sample], limit: int, slots: int, options: Options) -> list[list[Hypothesis]]:
    found = {}
    for done in Engine(model, options, slots).run(Request(sample.index, sample, limit) for sample in chosen):
        found[done.request.key] = done.hypotheses
    return [found[sample.index] for sample in chosen]


@pytest.mark.parametrize("alpha", [None, 0.0, 0.8])
def test_a_beam_as_wide_as_the_space_finds_what_brute_force_finds(restrict: Restrict, alpha: float | None):
    model, limit = restrict(TOY), 3
    chosen = samples(sounds(LENGTHS[:2]))
    options = Options.given(0.0, beam=64, patience=10.0, length_penalty=alpha)
    for sample, texts in zip(chosen, decode(model, chosen, limit, 1, options), strict=True):
        expected = list[tuple[tuple[int, ...], float]]()
        for length in range(limit + 1):
            for ids in itertools.product([token for token in TOY if token], repeat=length):
                path = (*ids, 0)
                total = sum(read(model, sample, path[:i])[0][token] for i, token in enumerate(path))
                expected.append((ids, normalised(total, len(path), alpha)))
        expected.sort(key=lambda found: -found[1])
        found = [text for text in texts if text.score > -20]  # of tokens that the toy has
        assert [text.ids for text in found] == [ids for ids, _ in expected] and not any(text.cut for text in found)
        assert [text.score for text in found] == pytest.approx([score for _, score in expected], abs=1e-4)
        assert len({len(ids) for ids, _ in expected[:10]}) > 1  # the best texts differ in length


@pytest.mark.parametrize(
    ("width", "patience", "alpha"), [(2, 1.0, None), (3, 2.0, 0.6), (4, 1.0, 1.0), (5, 0.4, None), (1, 1.0, None)]
)
def test_beam_equals_one_that_reads_everything_again(
    restrict: Restrict, width: int, patience: float, alpha: float | None
):
    model, limit = restrict(LETTERS), 7
    chosen = samples(sounds(LENGTHS))
    options = Options.given(0.0, beam=width, patience=patience, length_penalty=alpha)
    found = decode(model, chosen, limit, 2, options)
    for sample, texts in zip(chosen, found, strict=True):
        expected = plain_beam(model, sample, limit, width, patience, alpha) if width > 1 else None
        if expected is not None:
            assert [(text.ids, text.cut) for text in texts] == [(ids, cut) for ids, cut, _ in expected]
            assert [text.score for text in texts] == pytest.approx([score for *_, score in expected], abs=1e-4)
        for text in texts:
            whole = text.ids if text.cut else (*text.ids, 0)
            again = [read(model, sample, whole[:i])[0][token] for i, token in enumerate(whole)]
            assert text.logprobs == pytest.approx(again, abs=1e-4) and len(text.entropies) == len(again)
    assert len({len(text.ids) for texts in found for text in texts}) > 2
    if width > 1:
        greedy = decode(model, chosen, limit, 2, Options.given(0.0))
        assert [texts[0].ids for texts in found] != [texts[0].ids for texts in greedy]  # the search is worth its name


@pytest.mark.parametrize("family", ["x060", "x070"], scope="module")
def test_states_move_with_the_beams(restrict: Restrict):
    model = restrict(LETTERS | {0: -100.0})
    chosen = samples(sounds(LENGTHS[:3]))
    engine = Engine(model, Options.given(0.0, beam=4), slots=2)
    for sample in chosen:
        engine.submit(Request(sample, sample, 8))
    moved = 0
    while engine.num_unfinished:
        engine.poll()
        for job, beam in engine._beams:
            for row, track in zip(beam.slots, beam.tracks, strict=True):
                if track is None:
                    continue
                _, state = read(model, job.request.sample, track.ids[:-1])  # the last is read by the next step
                for table, expected in zip(engine._state, state, strict=True):
                    torch.testing.assert_close(table[:, row], expected[:, 0], rtol=1e-3, atol=1e-3)
                moved += len(track.ids) > 1
    assert moved > 50


def test_searches_of_several_requests_do_not_touch_each_other(restrict: Restrict):
    model, options = restrict(LETTERS), Options.given(0.0, beam=3)
    chosen = samples(sounds(LENGTHS))
    together = decode(model, chosen, 9, 2, options)
    assert together == [decode(model, [sample], 9, 2, options)[0] for sample in chosen]
    assert together == decode(model, chosen[::-1], 9, 2, options)[::-1]


def test_what_cannot_come_is_never_taken(restrict: Restrict):
    model = restrict({98: 0.0, 99: 0.0})
    [sample] = samples(sounds([3_000]))
    options = Options.given(0.0, beam=4, no_repeat_ngram_size=1)
    [texts] = decode(model, [sample], 8, 1, options)
    assert all(len(set(text.ids)) == len(text.ids) and math.isfinite(text.score) for text in texts)
