"""Greedy decoding in slots against reading everything again for every token."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from sounds import samples, sounds
from torch import Tensor

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.engine import Done, Engine, Request
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.reader import Encoded, Reader, Reading
from rwkv_speech.decoding.strategy import Hypothesis
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.state import State

LENGTHS = [3_000, 6_000, 1_450, 5_555, 2_000, 9_000, 2_500, 4_000]
NOTHING = [0, 399, 600]  # no frame, no frame, fewer frames than an audio token has


def hypothesis(ids: list[int], logprobs: list[float], entropies: list[float], cut: bool) -> Hypothesis:
    score = sum(logprobs) / max(1, len(logprobs))
    return Hypothesis(tuple(ids), tuple(logprobs), tuple(entropies), cut, score)


@torch.no_grad()
def oracle(model: SpeechLM, sample: Sample, limit: int, before: str = "", after: str = "") -> Hypothesis:
    """Reads everything again for every token, as no decoder should."""
    audio, _ = model.audio_tokens(collate([sample]))
    encode, embed = model.tokenizer.encode, model.lm.embed
    ids, logprobs, entropies = list[int](), list[float](), list[float]()
    while True:
        prompt = embed(torch.tensor(encode(before), dtype=torch.int64))
        text = embed(torch.tensor([*encode(after), model.separator_id, *ids]))
        state = model.initial_state([sample.task])
        logits = model.lm(inputs_embeds=torch.cat((prompt, audio, text))[None], state=state).logits[0, -1]
        distribution = torch.distributions.Categorical(logits=logits.double())
        token = int(logits.argmax())
        if token != 0 and len(ids) == limit:
            return hypothesis(ids, logprobs, entropies, True)
        logprobs.append(float(distribution.log_prob(torch.tensor(token))))
        entropies.append(float(distribution.entropy()))
        if token == 0:
            return hypothesis(ids, logprobs, entropies, False)
        ids.append(token)


@pytest.fixture(scope="module", params=["x060", "x070"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ending(model: SpeechLM) -> SpeechLM:
    """The model with the token that ends the most texts at different places made the end: its rows are swapped."""
    endless = [oracle(model, sample, 24).ids for sample in samples(sounds(LENGTHS))]
    assert len(set(endless)) > 4  # else the audio would not matter
    tokens = {token for ids in endless for token in ids}
    end = max(sorted(tokens), key=lambda t: len({ids.index(t) for ids in endless if t in ids}))
    with torch.no_grad():
        for matrix in (model.lm.head.weight, model.lm.emb.weight):
            matrix[[0, end]] = matrix[[end, 0]].clone()
    return model


def requests(chosen: Sequence[Sample], limit: int = 24) -> list[Request]:
    return [Request(sample.index, sample, limit) for sample in chosen]


def decode(engine: Engine, wanted: list[Request]) -> dict[int, Done]:
    return {done.request.key: done for done in engine.run(wanted)}


def assert_alike(model: SpeechLM, found: Sequence[Hypothesis], wanted: Sequence[Hypothesis]) -> None:
    """To the bit with the native step, where a slot's bits depend on nothing else; else but for rounding."""
    if model.lm.slots_are_apart:
        assert found == wanted
    assert [x.ids for x in found] == [x.ids for x in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_greedy_texts_equal_reading_everything_again(ending: SpeechLM):
    chosen = samples(sounds(LENGTHS))
    found = decode(Engine(ending, GREEDY, slots=3), requests(chosen))
    expected = {sample.index: oracle(ending, sample, 24) for sample in chosen}
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        [text] = found[key].hypotheses
        assert (text.ids, text.cut) == (wanted.ids, wanted.cut)
        assert text.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert text.entropies == pytest.approx(wanted.entropies, abs=1e-4)
        assert text.avg_logprob == pytest.approx(sum(wanted.logprobs) / len(wanted.logprobs), abs=1e-4)
    # The case is worth its name: texts end at different places, and some never do.
    assert len({len(text.ids) for text in expected.values() if not text.cut}) >= 2
    assert any(text.cut for text in expected.values())


@pytest.mark.parametrize("native", [True, False])
def test_every_order_and_number_in_flight_gives_the_same_bits(
    ending: SpeechLM, native: bool, monkeypatch: pytest.MonkeyPatch
):
    if not native:  # all slots make each step
        monkeypatch.setattr(RWKV, "_stepper", lambda lm: None)
    chosen = samples(sounds(LENGTHS))
    alone = {
        key: done.hypotheses
        for sample in chosen
        for key, done in decode(Engine(ending, GREEDY, slots=4), requests([sample])).items()
    }
    for order in itertools.islice(itertools.permutations(chosen), 0, 40_000, 5_000):
        engine, found = Engine(ending, GREEDY, slots=4), {}
        for request in requests(order):  # dribbling in: each round has other neighbours
            engine.submit(request)
            found |= {done.request.key: done.hypotheses for done in engine.poll()}
        while engine.num_unfinished:
            found |= {done.request.key: done.hypotheses for done in engine.poll()}
        assert found == alone


def test_a_request_keeps_its_own_limit(ending: SpeechLM):
    chosen = samples(sounds(LENGTHS))
    limits = [3, 24, 0, 1, 7, 7, 2, 12]
    wanted = [Request(s.index, s, limit) for s, limit in zip(chosen, limits, strict=True)]
    found = decode(Engine(ending, GREEDY, slots=2), wanted)
    for request in wanted:
        expected = oracle(ending, request.sample, request.limit)
        [text] = found[request.key].hypotheses
        assert (text.ids, text.cut, len(text.logprobs)) == (expected.ids, expected.cut, len(expected.logprobs))


def test_prompts_before_and_after_the_audio_are_read(ending: SpeechLM):
    [sample] = samples(sounds([6_000]))
    options = Options.given(0.0, initial_prompt=" the weather", prompt=" is good")
    [plain] = Engine(ending, GREEDY, slots=1).run(requests([sample]))
    [prompted] = Engine(ending, options, slots=1).run(requests([sample]))
    [other] = Engine(ending, options, slots=1).run([Request(0, sample, 24, before=" good good")])
    for done, before, after in (
        (plain, "", ""),
        (prompted, " the weather", " is good"),
        (other, " good good", " is good"),
    ):
        assert done.hypotheses[0].ids == oracle(ending, sample, 24, before, after).ids
    assert len({done.hypotheses[0].logprobs for done in (plain, prompted, other)}) == 3


def test_each_utterance_may_have_a_prompt(ending: SpeechLM):
    prompts = ["", " the weather", "", " good good"]
    chosen = [
        replace(sample, prompt_ids=tuple(ending.tokenizer.encode(prompt)))
        for sample, prompt in zip(samples(sounds([3_000] * 4)), prompts, strict=True)
    ]
    found = decode(Engine(ending, GREEDY, slots=4), requests(chosen))
    for sample, prompt in zip(chosen, prompts, strict=True):
        assert found[sample.index].hypotheses[0].ids == oracle(ending, sample, 24, prompt).ids


def test_a_round_without_time_reads_one_at_most_and_finds_the_same(ending: SpeechLM):
    wanted = requests(samples(sounds(LENGTHS)), limit=3)
    expected = decode(Engine(ending, GREEDY, slots=4), wanted)
    engine, found, left = Engine(ending, GREEDY, slots=4), dict[int, list[Hypothesis]](), list[int]()
    for request in wanted:
        engine.submit(request)
    while engine.num_unfinished:
        found |= {done.request.key: done.hypotheses for done in engine.poll(0.0)}
        left.append(len(engine._waiting))
    assert found == {key: done.hypotheses for key, done in expected.items()}
    assert max(a - b for a, b in itertools.pairwise([len(wanted), *left])) == 1


def test_what_holds_no_audio_token_is_done_at_once(ending: SpeechLM):
    engine = Engine(ending, GREEDY, slots=1)
    for request in requests(samples(sounds(NOTHING))):
        engine.submit(request)
    done = engine.poll()
    assert engine.num_unfinished == 0 and len(done) == len(NOTHING)
    assert all(d.hypotheses == [Hypothesis((), (), (), False, 0.0)] for d in done)
    assert done[0].hypotheses[0].avg_logprob == 0


def test_the_longest_of_what_waits_comes_first_but_nothing_waits_for_ever(ending: SpeechLM):
    engine = Engine(ending, GREEDY, slots=1)
    for request in requests(samples(sounds(LENGTHS)), limit=1):
        engine.submit(request)
    order = []
    while engine.num_unfinished:
        order += [len(done.request.sample.waveform) for done in engine.poll()]
    first, later = LENGTHS[:4], LENGTHS[4:]  # what is read ahead of one slot, and what comes after
    assert order == [*sorted(first, reverse=True), *sorted(later, reverse=True)]
    fair = Engine(ending, GREEDY, slots=1, window=1)
    for request in requests(samples(sounds(LENGTHS)), limit=1):
        fair.submit(request)
    order = [len(done.request.sample.waveform) for _ in range(40) for done in fair.poll()]
    assert order == LENGTHS


def test_run_takes_requests_as_they_are_wanted(ending: SpeechLM):
    taken = itertools.count()
    source = (request for request in requests(samples(sounds(LENGTHS * 4)), limit=2) if next(taken) >= 0)
    results = Engine(ending, GREEDY, slots=1).run(source)
    assert sum(1 for _ in itertools.islice(results, 3)) == 3 and next(taken) < 12
    assert sum(1 for _ in results) == len(LENGTHS) * 4 - 3


def test_samples_are_the_same_in_any_batch_and_the_likeliest_comes_first(ending: SpeechLM):
    chosen = samples(sounds(LENGTHS))
    options = Options.given(0.0, best_of=3, top_k=20, top_p=0.95)

    def sampled(slots: int, order: Sequence[Sample], temperature: float = 0.9) -> dict[int, list[Hypothesis]]:
        wanted = [Request(sample.index, sample, 12, temperature) for sample in order]
        return {key: done.hypotheses for key, done in decode(Engine(ending, options, slots), wanted).items()}

    found = sampled(4, chosen)
    assert found == sampled(4, chosen[::-1]) == {k: v for s in chosen for k, v in sampled(4, [s]).items()}
    for hypotheses in found.values():
        assert len(hypotheses) == 3 and len({text.ids for text in hypotheses}) > 1
        scores = [text.avg_logprob for text in hypotheses]
        assert scores == pytest.approx([text.score for text in hypotheses]) and scores == sorted(scores, reverse=True)
    assert found != sampled(4, chosen, 0.8)
    cold = sampled(2, chosen, 1e-4)
    greedy = decode(Engine(ending, GREEDY, 2), requests(chosen, 12))
    assert all({text.ids for text in cold[key]} == {done.hypotheses[0].ids} for key, done in greedy.items())


def test_greedy_and_sampled_requests_share_the_slots_of_a_beam_search(ending: SpeechLM):
    chosen = samples(sounds(LENGTHS))
    engine = Engine(ending, Options.given(0.0, beam=3, best_of=2), slots=2)
    wanted = [Request(s.index, s, 8, 0.7 * (i % 2)) for i, s in enumerate(chosen)]
    found = decode(engine, wanted)
    assert engine.num_unfinished == 0
    for request in wanted:
        alone = decode(Engine(ending, Options.given(0.0, beam=3, best_of=2), slots=2), [request])
        assert_alike(ending, found[request.key].hypotheses, alone[request.key].hypotheses)
        assert len(found[request.key].hypotheses) == (2 if request.temperature else 3)


@pytest.mark.parametrize("options", [GREEDY, Options.given(0.0, beam=2)])
def test_decoding_works_under_the_autocast_of_training(ending: SpeechLM, options: Options):
    chosen = samples(sounds(LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(Engine(ending, options, slots=3), requests(chosen))
    exact = decode(Engine(ending, options, slots=3), requests(chosen))
    close = [text.hypotheses[0].logprobs[:1] for text in (found[11], exact[11])]
    assert found.keys() == exact.keys() and close[0] == pytest.approx(close[1], abs=0.3)


@pytest.fixture(scope="module")
def of_two_tasks(tiny_parts: Parts) -> SpeechLM:
    """A model with two states that give other texts of the same audio."""
    model = SpeechLM.build(tiny_parts, task_names=["asr", "st_es"])
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for x in model.trained_parameters():
            x.copy_(0.5 * torch.randn(x.shape, generator=draw))
    return model.eval()


@pytest.mark.parametrize("rows", [1, 4])
def test_tasks_in_one_batch_are_decoded_as_each_by_itself(of_two_tasks: SpeechLM, rows: int):
    """With four rows as on a GPU: utterances of both tasks, with and without a prompt, share the packed passes."""
    model, passes = of_two_tasks, list[list[str]]()

    class Noted(Reader):
        def prefill(self, encoded: Sequence[Encoded], readings: Sequence[Reading]) -> tuple[Tensor, State]:
            passes.append([reading.task for reading in readings])
            return super().prefill(encoded, readings)

    def found(wanted: list[Request]) -> dict[tuple[str, int], Done]:
        engine = Engine(model, GREEDY, slots=4)
        engine._reader = Noted(model, rows)
        return {done.request.key: done for done in engine.run(wanted)}

    chosen = samples(sounds([5_800, 6_000, 5_900, 5_700, 3_000, 2_900]))
    mixed = [
        Request((task, sample.index), replace(sample, task=task), 16, before="1" if sample.index % 2 else None)
        for sample in chosen
        for task in ("asr", "st_es")
    ]
    together = found(mixed)
    assert rows == 1 or any(len(set(names)) == 2 for names in passes)
    apart = {key: x for task in ("asr", "st_es") for key, x in found([r for r in mixed if r.key[0] == task]).items()}
    assert {key: done.hypotheses for key, done in together.items()} == {
        key: done.hypotheses for key, done in apart.items()
    }
    first, second = (together[task, chosen[0].index].hypotheses[0].ids for task in ("asr", "st_es"))
    assert first != second
    for request in mixed[:4]:
        expected = oracle(model, request.sample, 16, request.before or "")
        assert together[request.key].hypotheses[0].ids == expected.ids


@pytest.mark.parametrize("options", [GREEDY, Options.given(0.0, beam=2), Options.given(0.7, best_of=2)], ids=str)
def test_what_is_cancelled_leaves_no_trace(ending: SpeechLM, options: Options):
    chosen = [replace(request, temperature=options.temperatures[0]) for request in requests(samples(sounds(LENGTHS)))]
    alone = {key: done.hypotheses for key, done in decode(Engine(ending, options, slots=2), chosen).items()}
    for rounds in range(8):
        engine, found = Engine(ending, options, slots=2), {}
        for request in chosen:
            engine.submit(request)
        for _ in range(rounds):
            found |= {done.request.key: done.hypotheses for done in engine.poll()}
        dropped = {request.key for request in chosen[::2]} - found.keys()
        engine.cancel(lambda request, dropped=dropped: request.key in dropped)
        assert engine.num_unfinished == len(chosen) - len(dropped) - len(found)
        while engine.num_unfinished:
            found |= {done.request.key: done.hypotheses for done in engine.poll()}
        assert found == {key: texts for key, texts in alone.items() if key not in dropped} and dropped
        assert not any(engine._jobs) and not any(engine._tracks)


def test_keywords_of_one_request_are_not_those_of_another(ending: SpeechLM):
    chosen = requests(samples(sounds(LENGTHS)))
    phrases = Options.given(0.0, keywords=["is good", "the"], keyword_weight=9.0)
    keywords = Keywords.of(phrases, ending.tokenizer, ending.lm.sizes.vocab, "cpu")
    plain = decode(Engine(ending, GREEDY, slots=3), chosen)
    listed = decode(Engine(ending, phrases, slots=3), chosen)
    mixed = [replace(request, keywords=keywords) if request.key % 2 else request for request in chosen]
    found = decode(Engine(ending, GREEDY, slots=3), mixed)
    for key in found:
        assert_alike(ending, found[key].hypotheses, (listed if key % 2 else plain)[key].hypotheses)
    assert plain[11].hypotheses != listed[11].hypotheses
