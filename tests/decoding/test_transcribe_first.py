"""Tasks that transcribe first against the same model's whole texts, cut by hand at the first separator."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sounds import samples, sounds

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding import strategy
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.session import Session
from rwkv_speech.decoding.streaming import Partial
from rwkv_speech.decoding.transcribe import SpeechLM, transcribe_batch
from rwkv_speech.decoding.transcriber import Recording, Transcriber
from rwkv_speech.errors import UserError
from rwkv_speech.models.ctc import CtcHead, CtcSpec

WAVES = sounds([3_000, 6_000, 1_450, 5_555, 2_000, 9_000])
LIMIT = 8
GREEDY = Options.given(0.0, vad="none")


def texts(model: SpeechLM, options: Options, limit: int) -> dict[int, tuple[int, ...]]:
    """All tokens of each of the waves, in the order in which they were written, without cutting."""
    model._set_transcribes(())
    asked = [Request(sample.index, sample, limit, options.temperatures[0]) for sample in samples(WAVES)]
    return {done.request.key: done.hypotheses[0].ids for done in Engine(model, options, 3).run(asked)}


@pytest.fixture(scope="module")
def separating(model: SpeechLM) -> SpeechLM:
    """The model that writes the separator where it would write the token that comes in most of its texts."""
    found = texts(model, GREEDY, LIMIT).values()
    tokens = sorted({token for ids in found for token in ids[1:]})
    often = max(tokens, key=lambda token: sum(token in ids[1:] for ids in found))
    with torch.no_grad():
        head, separator = model.lm.head.weight, model.separator_id
        head[[separator, often]] = head[[often, separator]].clone()
    return model


@pytest.fixture
def first(separating: SpeechLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpeechLM]:
    monkeypatch.setattr(strategy, "_HEARD_TOKENS", LIMIT)
    separating.transcribe_first(["asr"])
    yield separating
    separating._set_transcribes(())


def cut(ids: tuple[int, ...], separator: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What was heard, and the answer, of most LIMIT tokens each."""
    at = ids.index(separator) if separator in ids[:LIMIT] else LIMIT
    return ids[:at], ids[at + 1 : at + 1 + LIMIT] if at < LIMIT else ()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_answer_is_what_follows_the_first_separator(first: SpeechLM, temperature: float):
    options = Options.given(temperature, vad="none", best_of=1, top_k=2)
    expected = {key: cut(ids, first.separator_id) for key, ids in texts(first, options, 2 * LIMIT + 1).items()}
    assert any(answer for _, answer in expected.values())
    first.transcribe_first(["asr"])
    engine, shown = Engine(first, options, 3), dict[int, list[list[int]]]()
    for sample in samples(WAVES):
        engine.submit(Request(sample.index, sample, LIMIT, temperature))
    found = {}
    while engine.num_unfinished:
        for done in engine.poll():
            best = done.hypotheses[0]
            assert len(best.logprobs) == len(best.entropies) == len(best.ids) + (not best.cut)
            found[done.request.key] = best.heard, best.ids
        for request, ids in engine.unfinished():
            shown.setdefault(request.key, []).append([*ids])
    assert found == expected
    for key, parts in shown.items():  # of what is being written nothing but the answer is seen
        assert all(tuple(part) == expected[key][1][: len(part)] for part in parts)


def test_a_beam_search_and_a_draft_cut_their_texts_too(first: SpeechLM):
    [heard] = {done.hypotheses[0].heard for done in run(first, GREEDY, 1)}
    assert heard is not None
    for options, asked in ((replace(GREEDY, beam=3), {}), (GREEDY, {"draft": first.tokenizer.decode(heard)})):
        [done] = run(first, options, 1, **asked)
        assert done.hypotheses and all(x.heard is not None for x in done.hypotheses)
        assert all(first.separator_id not in (x.heard or ()) for x in done.hypotheses)
    assert (done.hypotheses[0].heard, done.hypotheses[0].ids) == (heard, run(first, GREEDY, 1)[0].hypotheses[0].ids)


def run(model: SpeechLM, options: Options, count: int, **asked: str):
    requests = [Request(x.index, x, LIMIT, **asked) for x in samples(WAVES)[:count]]
    return list(Engine(model, options, 1).run(requests))


def test_a_session_remembers_what_it_wrote_and_shows_the_answer(first: SpeechLM):
    session, options, answers = Session(first, "asr"), replace(GREEDY, max_new_tokens=LIMIT), list[str]()
    for said in (WAVES[1], "the weather", WAVES[3]):
        copy, whole = session.fork(), session.fork()
        [done] = Engine(first, options, 1).run([session.request(said, options)])
        best, turn = done.hypotheses[0], session.take(done)
        assert best.heard and turn.heard == first.tokenizer.decode(best.heard) and turn.tokens == best.ids
        assert "".join(copy.stream(said, vad="none", temperature=0.0, max_new_tokens=LIMIT)) == turn.text
        answers.append(turn.text)
        # Without the setting, and with all that was written given as the answer.
        first._set_transcribes(())
        [plain] = Engine(first, options, 1).run([whole.request(said, options)])
        whole.take(plain, [*best.heard, first.separator_id, *best.ids])
        first.transcribe_first(["asr"])
        for found in (copy, whole):
            assert all(torch.equal(x, y) for x, y in zip(session.state, found.state, strict=True))
    assert any(answers)


def test_transcripts_and_rows_hold_the_answer_and_what_was_heard(first: SpeechLM):
    found = first.transcribe(WAVES, temperature=0.0, vad="none", max_new_tokens=LIMIT)
    whole = texts(first, GREEDY, 2 * LIMIT + 1)
    first.transcribe_first(["asr"])
    decode = first.tokenizer.decode
    assert all(x.heard is not None for x in found)
    pairs = sorted(tuple(decode(part).strip() for part in cut(ids, first.separator_id)) for ids in whole.values())
    assert sorted(((x.heard or "").strip(), x.text.strip()) for x in found) == pairs
    text = Sample("t", torch.zeros(0), "", [], 0.0, 99, "asr", input_ids=tuple(first.tokenizer.encode("the weather")))
    rows = transcribe_batch(first, collate([*samples(WAVES[:2]), text]), replace(GREEDY, max_new_tokens=LIMIT))
    assert [(row.hyp, row.heard) for row in rows[:2]] == [(x.text, x.heard) for x in found[:2]]
    assert rows[2].heard
    first._set_transcribes(())
    assert {x.heard for x in first.transcribe(WAVES[:1], temperature=0.0, max_new_tokens=LIMIT)} == {None}


def test_a_text_that_never_reaches_the_separator_is_no_answer(first: SpeechLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first, "separator_of", lambda task: 1)  # a byte that it never writes
    transcriber, tried = Transcriber(first, Options.given((0.0, 0.5), vad="none", max_new_tokens=LIMIT), 1), []
    submit = transcriber.engine.submit
    monkeypatch.setattr(
        transcriber.engine, "submit", lambda request: (tried.append(request.temperature), submit(request))
    )
    [(_, found)] = transcriber.run([Recording(0, "a", lambda: [WAVES[1]], "asr")])
    assert (found.text, found.segments, tried) == ("", [], [0.0, 0.5]) and found.heard
    stream = first.stream(pace=0.125, vad="none", temperature=0.0, max_new_tokens=LIMIT)
    events = [*stream.push(torch.cat(WAVES)), *stream.finish()]
    partials = [event.text for event in events if isinstance(event, Partial)]
    assert partials and set(partials) == {""}


def test_words_of_such_a_task_cannot_be_committed(first: SpeechLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first, "ctc", CtcHead(first.encoder.width, CtcSpec(" abc", hidden=8)).eval())
    with pytest.raises(UserError, match="commit: found word, but task asr writes what it hears"):
        first.stream(commit="word", temperature=0.0)
