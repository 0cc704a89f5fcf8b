"""A small world that five languages speak of: recognition, translation, questions, topics and conversations."""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from rwkv_speech.synthetic.grammar import CHAT_LANGUAGES, CLAIMS, FACTS, QUESTIONS, SENTENCES, SMALL_TALK, said

TOPICS = ("food", "home", "numbers", "people", "travel", "weather")
TASKS = ("asr", "st", "qa", "topic", "chat")


@dataclass(frozen=True)
class Line:
    """One thing to learn: `said` is spoken in `lang`, `text` is to be written, in `text_lang`.

    `before` holds the earlier turns of a conversation, (said, answer) each. `key` is the same for the same meaning
    in all languages; `split` tells by it which lines may be learned from.
    """

    task: str
    said: str
    lang: str
    text: str
    text_lang: str
    before: tuple[tuple[str, str], ...] = ()
    key: str = ""


def split(key: str) -> str:
    """The part that lines of this key belong to, by its SHA-256: a tenth "test", a twentieth "valid", else "train"."""
    share = hashlib.sha256(key.encode()).digest()[0] / 256
    return "test" if share < 0.1 else "valid" if share < 0.15 else "train"


def conversation(rng: random.Random, lang: str, between: int) -> Line:
    """A fact is told, `between` turns of other things pass, and the fact is asked for; `lang` of CHAT_LANGUAGES.

    A turn between is small talk or, once in a conversation, another fact of another kind.
    """
    at = CHAT_LANGUAGES.index(lang)
    fact, other = rng.sample(FACTS, 2)
    row, english = fact.fill(rng), CHAT_LANGUAGES.index("en")
    told, key = said(fact.told[at], row, lang), said(fact.told[english], row, "en")
    turns = [rng.choice(SMALL_TALK[lang]) for _ in range(between)]
    if between and rng.random() < 0.5:
        turns[rng.randrange(between)] = (said(other.told[at], other.fill(rng), lang), other.reply[at])
    asked, answer = said(fact.asked[at], row, lang), said(fact.answer[at], row, lang)
    return Line("chat", asked, lang, answer, lang, ((told, fact.reply[at]), *turns), key)


def follow_ups(rng: random.Random, lang: str, part: str = "train") -> list[tuple[str, str]]:
    """Two to six claims and all of them asked for in some order: (said, answer) of each turn."""
    claims = rng.choice(CLAIMS)
    while split(claims.tell(rows := claims.draw(rng, rng.randint(2, 6)), "en")) != part:
        pass
    asked = [(claims.ask(row, lang), claims.reply(row, lang)) for row in rng.sample(rows, len(rows))]
    return [(f"{claims.tell(rows, lang)} {asked[0][0]}", asked[0][1]), *asked[1:]]


def _draw(rng: random.Random, task: str, lang: str, text_lang: str) -> Line:
    if task == "chat":
        return conversation(rng, lang, rng.choice((0, 0, 1, 2)))
    if task == "qa":
        question = rng.choice(QUESTIONS)
        filled = question.fill(rng)
        return Line(
            task, question.say(filled, lang), lang, question.answer(filled, text_lang), text_lang,
            key=question.key(filled),
        )  # fmt: skip
    if task == "topic":
        topic = rng.choice(TOPICS)
        frame = rng.choice([frame for frame in SENTENCES if frame.topic == topic])
        row = frame.fill(rng)
        return Line(task, frame.say(row, lang), lang, topic, text_lang, key=frame.key(row))
    frame = rng.choice(SENTENCES)
    row = frame.fill(rng)
    return Line(task, frame.say(row, lang), lang, frame.say(row, text_lang), text_lang, key=frame.key(row))


def draw(rng: random.Random, task: str, lang: str = "en", text_lang: str | None = None, part: str = "train") -> Line:
    """A line of a task of TASKS that `split` gives to `part`: "train", "valid" or "test".

    asr repeats what is said, st says it in `text_lang`, qa answers a question, topic names one of TOPICS in English,
    and chat, in CHAT_LANGUAGES alone, asks for what an earlier turn told.
    """
    text_lang = text_lang or ("en" if task == "topic" else lang)
    while split((line := _draw(rng, task, lang, text_lang)).key) != part:
        pass
    return line


@cache
def words(lang: str) -> tuple[str, ...]:
    """Every word that the world says or writes in `lang`, sorted."""
    rng, found = random.Random(0), set[str](TOPICS if lang == "en" else ())
    for task in ("asr", "qa", "chat") if lang in CHAT_LANGUAGES else ("asr", "qa"):
        for _ in range(3000):
            line = _draw(rng, task, lang, lang)
            found |= {word for text in (line.said, line.text, *sum(line.before, ())) for word in text.split()}
    return tuple(sorted(found))
