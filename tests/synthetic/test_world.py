import random
import re

import pytest

from rwkv_speech.synthetic import lexicon, world
from rwkv_speech.synthetic.grammar import CHAT_LANGUAGES, SENTENCES
from rwkv_speech.synthetic.phones import LANGUAGES

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
OPPOSITES = "big small new old good bad heavy light clean dirty long short fast slow".split()


def answer_of(question: str) -> str:
    """What an English question asks for, read out of its words."""
    if match := re.fullmatch(r"how many are (\w+) (\w+) and (\w+) \2", question):
        return NUMBERS[NUMBERS.index(match[1]) + NUMBERS.index(match[3])]
    if match := re.fullmatch(r"how is the \w+ if it is not (\w+)", question):
        return OPPOSITES[OPPOSITES.index(match[1]) ^ 1]
    if match := re.fullmatch(r"(.+) has (\w+) (\w+) and (.+) has (\w+) who has more \3", question):
        return match[1] if NUMBERS.index(match[2]) > NUMBERS.index(match[5]) else match[4]
    if match := re.fullmatch(r"(.+) bought (the \w+) and (.+) bought (the \w+) what was bought by (.+)", question):
        return match[2] if match[1] == match[5] else match[4]
    match = re.fullmatch(r"the (\w+) is (.+) and the (\w+) is (.+) (?:where|what colour) is the (\w+)", question)
    assert match, question
    return match[2] if match[1] == match[5] else match[4]


def test_questions_have_the_answer_that_their_words_give():
    rng = random.Random(0)
    lines = [world.draw(rng, "qa") for _ in range(600)]
    assert [line.text for line in lines] == [answer_of(line.said) for line in lines]
    assert len({line.said for line in lines}) > 500


def test_claims_are_all_asked_for_and_answered():
    rng, counts = random.Random(5), set[int]()
    for _ in range(200):
        (first, *_), *_ = turns = world.follow_ups(rng, "en")
        counts.add(len(turns))
        asks = r" (where is the \w+|what colour is the \w+|what was bought by .+)$"
        told, question = re.split(asks, first)[:2]
        claims = told.split(" and ")
        assert len(claims) == len(turns) == len({said for said, _ in turns})
        for said, answer in ((question, turns[0][1]), *turns[1:]):
            of = re.sub("^(where is|what colour is|what was bought by) ", "", said)
            assert {f"{of} is {answer}", f"{of} bought {answer}"} & set(claims)
        assert world.split(told) == "train"
    assert counts == {2, 3, 4, 5, 6}


def test_the_same_meaning_in_five_languages():
    """Agreement of gender and number, cases, elided articles: sentences written out by hand."""
    bought, has = SENTENCES[3], SENTENCES[9]
    words = {"p": lexicon.PEOPLE[0], "v": lexicon.PAST_VERBS[0], "c": lexicon.COLOURS[3], "n": lexicon.THINGS[0]}
    row = {**words, "when": lexicon.PAST[1]}
    assert [bought.say(row, lang) for lang in LANGUAGES] == [
        "my mother bought a white car yesterday",
        "mi madre compró un coche blanco ayer",
        "ma mère a acheté une voiture blanche hier",
        "mia madre ha comprato una macchina bianca ieri",
        "моя мама купила белую машину вчера",
    ]
    birds = {"p": lexicon.PEOPLE[8], "n": lexicon.ANIMALS[3]}
    assert has.say({**birds, "k": lexicon.NUMBERS[2]}, "ru") == "у врача две птицы"
    assert has.say({**birds, "k": lexicon.NUMBERS[5]}, "ru") == "у врача пять птиц"
    where = {"n": lexicon.ANIMALS[3], "place": lexicon.PLACES[-1]}
    assert SENTENCES[0].say(where, "fr") == "l'oiseau est derrière l'arbre"
    assert SENTENCES[0].say(where, "it") == "l'uccello è dietro l'albero"


def test_parts_share_no_meaning_in_any_language():
    keys = dict[str, set[str]]()
    for part in ("train", "valid", "test"):
        rng = random.Random(1)
        keys[part] = {
            world.draw(rng, task, lang, part=part).key
            for task in world.TASKS
            for lang in (CHAT_LANGUAGES if task == "chat" else LANGUAGES)
            for _ in range(60)
        }
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["valid"] and not keys["valid"] & keys["test"]
    parts = [world.split(f"sentence {i}") for i in range(4000)]
    assert parts.count("test") == pytest.approx(400, abs=80) and parts.count("valid") == pytest.approx(200, abs=60)


def test_translations_and_topics():
    rng = random.Random(2)
    line = world.draw(rng, "st", "es", "en")
    assert line.text == line.key != line.said
    topics = [world.draw(rng, "topic", lang) for lang in LANGUAGES for _ in range(30)]
    assert {line.text for line in topics} == set(world.TOPICS) and {line.text_lang for line in topics} == {"en"}
    assert all(line.text != "numbers" or re.search(r"has|number", line.key) for line in topics)


@pytest.mark.parametrize("lang", CHAT_LANGUAGES)
def test_conversations_tell_what_they_ask_for_and_nothing_else_of_its_kind(lang: str):
    rng = random.Random(3)
    for between in (0, 1, 9):
        for _ in range(100):
            line = world.conversation(rng, lang, between)
            assert len(line.before) == 1 + between
            told = [said for said, _ in line.before if said.endswith(line.text)]
            assert told == [line.before[0][0]]


def test_words_are_those_of_all_lines():
    rng = random.Random(4)
    for lang in LANGUAGES:
        known = set(world.words(lang))
        assert 200 < len(known) < 400
        assert all(set(world.draw(rng, "asr", lang).said.split()) <= known for _ in range(500))
    assert not {word for word in world.words("ru") if re.search("[a-z]", word)}
