"""Conversations against reading the whole of them again for every token."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile as sf
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sounds import samples, sounds
from torch import Tensor

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.engine import Engine
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.session import Session, converse
from rwkv_speech.decoding.transcribe import SpeechLM, transcribe_batch, transcribe_batches
from rwkv_speech.errors import UserError

SHORT = {"max_new_tokens": 12}
OPTIONS = Options.given(0.0, **SHORT)
WAVES = sounds([3_000, 6_000, 2_000, 4_000])
BREAK = [1 + ord("\n")] * 2  # the vocabulary's ids are bytes + 1


@pytest.fixture(scope="module", params=["x060", "x070"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def ending(model: SpeechLM) -> SpeechLM:
    """The model with a token that comes in some texts made the end."""
    ids = [token for wave in WAVES for token in Session(model, "asr").say(wave, **SHORT).tokens[3:]]
    with torch.no_grad():
        for matrix in (model.lm.head.weight, model.lm.emb.weight):
            matrix[[0, ids[0]]] = matrix[[ids[0], 0]].clone()
    return model


@torch.no_grad()
def oracle(model: SpeechLM, turns: Sequence[Tensor | str], limit: int = 12) -> list[tuple[tuple[int, ...], bool]]:
    """The answer to each turn; everything from the conversation's start on is read again for every token."""
    embed, history, answers = model.lm.embed, list[Tensor](), list[tuple[tuple[int, ...], bool]]()
    for number, said in enumerate(turns):
        before = embed(torch.tensor(BREAK if number else [], dtype=torch.int64))
        if isinstance(said, str):
            heard = embed(torch.tensor(model.tokenizer.encode(said)))
        else:
            heard, _ = model.audio_tokens(collate([Sample("", said, "", [], len(said) / 16_000, 0, "asr")]))
        history += [before, heard, embed(torch.tensor([model.separator_id]))]
        ids, cut = list[int](), False
        while True:
            x = torch.cat([*history, embed(torch.tensor(ids, dtype=torch.int64))])[None]
            token = int(model.lm(inputs_embeds=x, state=model.initial_state(["asr"])).logits[0, -1].argmax())
            if token == 0 or len(ids) == limit:
                cut = token != 0
                break
            ids.append(token)
        history.append(embed(torch.tensor(ids, dtype=torch.int64)))
        answers.append((tuple(ids), cut))
    return answers


def test_answers_equal_reading_the_conversation_again(ending: SpeechLM):
    turns = [WAVES[0], " the weather", WAVES[1], " is good", WAVES[2]]
    session = Session(ending, "asr")
    found = [session.say(said, **SHORT) for said in turns]
    expected = oracle(ending, turns)
    assert [(turn.tokens, turn.cut) for turn in found] == expected
    assert len({ids for ids, _ in expected}) > 2 and {cut for _, cut in expected} == {True, False}
    assert [turn.text for turn in found] == [ending.tokenizer.decode(ids) for ids, _ in expected]
    assert session.num_turns == 5


def test_what_was_said_before_matters(ending: SpeechLM):
    answers = set()
    for first in WAVES:
        session = Session(ending, "asr")
        session.say(first, **SHORT)
        answers.add(session.say(WAVES[0], **SHORT).tokens)
    assert len(answers) > 1


def test_sessions_in_one_batch_equal_sessions_alone(ending: SpeechLM):
    talks = [[WAVES[0], " is", WAVES[1]], [WAVES[2], " good", WAVES[3]], [" the", WAVES[1], " the"]]
    alone = [Session(ending, "asr") for _ in talks]
    expected = [[session.say(said, **SHORT) for said in talk] for session, talk in zip(alone, talks, strict=True)]
    together, engine = [Session(ending, "asr") for _ in talks], Engine(ending, OPTIONS, slots=2)
    for number in range(3):
        asked = zip(together, talks, strict=True)
        for done in engine.run([session.request(talk[number], OPTIONS, session) for session, talk in asked]):
            turn = done.request.key.take(done)
            assert turn == expected[together.index(done.request.key)][number]
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.state, other.state, strict=True))
    pointers = {x.data_ptr() for session in together for x in session._state}
    assert len(pointers) == 3 * len(together)


def test_converse_goes_on_with_its_own_or_given_answers(ending: SpeechLM):
    first, second = samples(WAVES)[:2], samples(WAVES)[2:]
    for sample in (*first, *second):
        sample.ids[:] = ending.tokenizer.encode(" the weather")
    own, given = ({s.index: t for s, t in converse(ending, [first, second], OPTIONS, 2, x)} for x in (False, True))
    session = Session(ending, "asr")
    for sample in first:
        assert own[sample.index] == session.say(sample.waveform, **SHORT)
    assert given[first[0].index] == own[first[0].index]
    session = Session(ending, "asr")
    [done] = Engine(ending, OPTIONS, 1).run([session.request(first[0], OPTIONS)])
    session.take(done, first[0].ids)
    assert given[first[1].index] == session.say(first[1].waveform, **SHORT) != own[first[1].index]


@pytest.mark.parametrize("options", [{}, {"beam": 3}, {"temperature": 0.7, "best_of": 2}])
def test_parts_of_an_answer_are_its_text(ending: SpeechLM, options: dict[str, float]):
    for wave in WAVES:
        whole = Session(ending, "asr").say(wave, **SHORT, **options)
        session = Session(ending, "asr")
        parts = list(session.stream(wave, **SHORT, **options))
        assert "".join(parts) == whole.text and session.num_turns == 1
        assert len(parts) > 1 or options or len(whole.tokens) < 2


def test_a_session_goes_on_from_its_file_as_if_it_had_never_stopped(ending: SpeechLM, tmp_path: Path):
    session, path = Session(ending, "asr"), tmp_path / "talk" / "a.session"
    session.say(WAVES[0], **SHORT)
    session.save(path)
    size = path.stat().st_size
    again = Session.load(path, ending, task="asr")
    assert again.num_turns == 1 and again.say(WAVES[1], **SHORT) == session.say(WAVES[1], **SHORT)
    session.save(path)
    assert abs(path.stat().st_size - size) < 8 and [p.name for p in path.parent.iterdir()] == ["a.session"]


def test_a_fork_goes_its_own_way(ending: SpeechLM):
    session = Session(ending, "asr")
    session.say(WAVES[0], **SHORT)
    before, fork = session.state, session.fork()
    assert fork.say(WAVES[1], **SHORT) == session.fork().say(WAVES[1], **SHORT)
    assert all(torch.equal(x, y) for x, y in zip(before, session.state, strict=True)) and session.num_turns == 1


def test_an_answer_is_taken_once_and_by_its_own_session(ending: SpeechLM):
    session, other = Session(ending, "asr"), Session(ending, "asr")
    [done] = Engine(ending, OPTIONS, 1).run([session.request(WAVES[0], OPTIONS)])
    with pytest.raises(UserError, match="another turn or another session"):
        other.take(done)
    session.take(done)
    with pytest.raises(UserError, match="another turn"):
        session.take(done)


def test_audio_too_short_to_be_heard_leaves_the_session_as_it_was(ending: SpeechLM):
    session = Session(ending, "asr")
    assert session.say(torch.zeros(300), **SHORT).text == "" and session.num_turns == 0


def test_other_weights_and_damage_are_named(ending: SpeechLM, tmp_path: Path):
    path = tmp_path / "a.session"
    Session(ending, "asr").save(path)
    with pytest.raises(UserError, match=r"a\.session: is a session of the task 'asr', found --task st; leave it out"):
        Session.load(path, ending, task="st")
    for part, x in (("adapter", ending.adapter[0].bias), ("initial state", ending.initial_states["asr"])):
        kept = x.detach().clone()
        with torch.no_grad():
            x += 1
            with pytest.raises(UserError, match=rf"a\.session: was made with another {part} \(SHA-256"):
                Session.load(path, ending)
            x.copy_(kept)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"a\.session: is damaged"):
        Session.load(path, ending)
    for broken in (b"", content[:-40], b"not a session at all"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.session: cannot be read as a session"):
            Session.load(path, ending)
    save_file({"x": torch.zeros(1)}, path)
    with safe_open(path, "pt"), pytest.raises(UserError, match="is no session"):
        Session.load(path, ending)


def test_rows_of_a_set_that_holds_conversations_texts_and_utterances(ending: SpeechLM):
    a, b, c, d = samples(WAVES)
    typed = Sample("t", torch.empty(0), "", [], 0.0, 3, "asr", input_ids=tuple(ending.tokenizer.encode(" the")))
    talk = [replace(c, id="c#1", turn=1), replace(typed, id="c#2", index=c.index, turn=2)]
    batches = [collate([a, *talk, typed]), collate([d]), collate([b])]
    rows = {row.place: row for row in transcribe_batches(ending, batches, OPTIONS, 2)}
    session = Session(ending, "asr")
    expected = [session.say(c.waveform, **SHORT).text, session.say(" the", **SHORT).text]
    assert [rows[c.index, turn].hyp for turn in (1, 2)] == expected
    assert [rows[c.index, turn].id for turn in (1, 2)] == ["c#1", "c#2"]
    assert rows[3, 0].hyp == Session(ending, "asr").say(" the", **SHORT).text and rows[3, 0].turn is None
    for sample, found in zip((a, b, d), transcribe_batch(ending, collate([a, b, d]), OPTIONS), strict=True):
        assert rows[sample.index, 0] == found
    assert len(rows) == 6
    [*again] = transcribe_batch(ending, batches[0], OPTIONS)
    assert again == [rows[place] for place in ((a.index, 0), (c.index, 1), (c.index, 2), (3, 0))]


def test_the_model_gives_sessions(ending: SpeechLM, tmp_path: Path):
    sf.write(tmp_path / "a.wav", WAVES[0].numpy(), 16_000, subtype="FLOAT")
    session = ending.session()
    assert session.say(tmp_path / "a.wav", **SHORT) == ending.session("asr").say(WAVES[0].numpy(), **SHORT)
    session.save(tmp_path / "a.session")
    assert ending.session(path=tmp_path / "a.session").num_turns == 1
    with pytest.raises(UserError, match="found no state named 'chat', expected one of asr"):
        ending.session("chat")
