"""Draft and verify against greedy decoding."""

import random
from collections.abc import Callable

import pytest
from rapidfuzz.distance import Levenshtein
from sounds import samples, sounds

from rwkv_speech.decoding.draft import Draft, distances, fit
from rwkv_speech.decoding.engine import Done, Engine, Request
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.errors import UserError

LENGTHS = [3_000, 6_000, 1_450, 5_555, 2_000, 9_000]
LETTERS = {0: 0.2} | dict.fromkeys(range(98, 124), 0.0) | {33: 0.5} | {257: 0.0, 258: 0.0}
LIMIT = 24

Restrict = Callable[[dict[int, float]], SpeechLM]


def edited(text: str, draw: random.Random, edits: int) -> str:
    """Letters replaced, left out and put in at random places."""
    for _ in range(edits):
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.choice(["", "x", " the", "é"]) + text[place + draw.randrange(2) :]
    return text


def decode(model: SpeechLM, drafts: list[str | None], slots: int, options: Options = GREEDY) -> list[Done]:
    chosen = samples(sounds(LENGTHS))
    requests = [
        Request(i, sample, LIMIT, draft=draft) for i, (sample, draft) in enumerate(zip(chosen, drafts, strict=True))
    ]
    return sorted(Engine(model, options, slots).run(requests), key=lambda done: done.request.key)


def same(found: list[Done], expected: list[Done]) -> None:
    for one, other in zip(found, expected, strict=True):
        [text], [wanted] = one.hypotheses, other.hypotheses
        assert (text.ids, text.cut) == (wanted.ids, wanted.cut)
        assert text.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert text.entropies == pytest.approx(wanted.entropies, abs=1e-4)


CHANGED = [
    Options.given(0.0, repetition_penalty=1.5, no_repeat_ngram_size=3),
    Options.given(0.0, keywords=["xyz bc\t1", "the weather\t2"]),
]


@pytest.mark.parametrize("options", [GREEDY, *CHANGED])
def test_any_draft_gives_the_text_of_greedy_decoding(restrict: Restrict, options: Options):
    model = restrict(LETTERS)
    plain = decode(model, [None] * len(LENGTHS), 3, options)
    texts = [model.tokenizer.decode(done.hypotheses[0].ids) for done in plain]
    assert any(done.hypotheses[0].cut for done in plain) and any(not done.hypotheses[0].cut for done in plain)
    draw = random.Random(0)
    drafts: list[list[str]] = [[edited(text, draw, edits) for text in texts] for edits in (1, 2, 5)]
    drafts += [texts[::-1], [text * 2 for text in texts], [text[:-3] for text in texts], [""] * len(texts)]
    drafts += [["zzzz zz z" * 9] * len(texts), ["\ud800 天気 é" * 5] * len(texts)]
    for draft in drafts:
        same(decode(model, list(draft), 3, options), plain)


def test_a_right_draft_takes_two_passes_and_a_wrong_letter_one_more(restrict: Restrict):
    model = restrict(LETTERS)
    plain = decode(model, [None] * len(LENGTHS), 2)
    texts = [model.tokenizer.decode(done.hypotheses[0].ids) for done in plain]
    assert all(done.passes == len(done.hypotheses[0].ids) + 1 for done in plain)
    assert [done.passes for done in decode(model, list(texts), 2)] == [2 if text else 1 for text in texts]
    for done, text in zip(decode(model, [text[:3] + "x" + text[4:] for text in texts], 2), texts, strict=True):
        assert done.passes <= 3 or len(text) < 5


def test_a_draft_of_no_use_costs_few_passes_more(restrict: Restrict):
    model = restrict(LETTERS)
    plain = decode(model, [None] * len(LENGTHS), 2)
    for done, other in zip(plain, decode(model, ["zyzyzy" * 9] * len(LENGTHS), 2), strict=True):
        assert other.passes <= done.passes + 1


def test_drafts_and_others_share_the_slots(restrict: Restrict):
    model = restrict(LETTERS)
    plain = decode(model, [None] * len(LENGTHS), 2)
    mixed = [None if i % 2 else "the the the" for i in range(len(LENGTHS))]
    for slots in (1, 2, 8):
        same(decode(model, list(mixed), slots), plain)


def test_weights_without_a_head_have_no_draft(model: SpeechLM):
    with pytest.raises(UserError, match="--draft 1: the weights have no CTC head"):
        Engine(model, Options.given(0.0, draft=1))


@pytest.mark.parametrize(
    ("draft", "text", "rest"),
    [
        (" the wether is good", "", " the wether is good"),
        (" the wether is good", " the weather", " is good"),  # a word spelt otherwise
        (" the dog is good", " the cat", " is good"),  # another word
        (" the very weather is good", " the weather", " is good"),  # put in
        (" the wethe ris good", " the weather", " ris good"),
        (" visit the neighbo on", " visit the neighbor", " on"),  # at the end of a word rather than behind its blank
        (" the weather", " the weather is good", ""),
        ("ü 天気", "ü", " 天気"),
        ("天気", "夫", "気"),  # whole characters
    ],
)
def test_a_draft_goes_on_where_the_text_fits_it_best(model: SpeechLM, draft: str, text: str, rest: str):
    tokenizer = model.tokenizer
    assert draft.encode()[fit(text.encode(), draft.encode()) :].decode() == rest
    going = Draft(draft, tokenizer)
    going.go_on(tokenizer.encode(text), [])
    assert tokenizer.decode(going.tokens) == rest


def test_a_draft_comes_back_after_a_word_too_many(model: SpeechLM):
    tokenizer, draft = model.tokenizer, Draft(" the good is weather", model.tokenizer)
    for text in (" the very", " the very good"):
        draft.go_on(tokenizer.encode(text), [])
    assert tokenizer.decode(draft.tokens) == " is weather"


def test_words_that_the_model_would_spell_otherwise_are_mended(model: SpeechLM):
    tokenizer = model.tokenizer
    [the, weather, _, good] = tokenizer.encode(" the weather is good")
    draft = Draft(" the wether is goot", tokenizer)
    likely = [the if token == the else 1 for token in draft.tokens]
    likely[1] = weather  # in the place of " "
    likely[-5] = good
    draft.go_on([the], likely)
    assert tokenizer.decode(draft.tokens) == " weather is good"


def test_distances_are_levenshteins():
    draw = random.Random(1)
    for _ in range(50):
        text, draft = (bytes(draw.choices(b"abc ", k=draw.randrange(9))) for _ in range(2))
        expected = [Levenshtein.distance(text, draft[:n]) for n in range(len(draft) + 1)]
        assert distances(text, draft).tolist() == expected
