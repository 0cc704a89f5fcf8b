"""The grammar of the small world: templates in five languages, filled with rows of the lexicon.

The same rows give the same meaning in every language. `{noun.the}` is a form of a word, `{colour@noun}` the form that
agrees with that word's gender and `{noun*count}` the one that follows that number.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rwkv_speech.synthetic import lexicon
from rwkv_speech.synthetic.lexicon import Word
from rwkv_speech.synthetic.phones import LANGUAGES

CHAT_LANGUAGES = ("en", "es")

_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?(?:([@*])(\w+))?\}")
Row = dict[str, Word]


def said(template: str, row: Row, lang: str) -> str:
    """The template of one language with the forms of its words."""

    def form(slot: re.Match[str]) -> str:
        name, wanted, relation, other = slot.groups()
        forms = row[name][lang]
        if relation == "*":
            few = row[other][lang].get("m") in ("два", "три", "четыре")
            return forms["few" if few else "many"]
        if relation == "@":
            gender = row[other][lang]["g"]
            if wanted:  # Russian adjectives before an object: only the feminine changes
                gender = f"{wanted}_f" if gender == "f" else gender
            return forms.get(gender, forms["m"])
        if wanted:
            return forms.get(wanted, forms.get("one", ""))
        return forms.get("one", forms.get("m", ""))

    return _SLOT.sub(form, template)


def _templates(table: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in table.split("|"))


@dataclass(frozen=True)
class Frame:
    """Templates in the order of LANGUAGES, what fills them, and the topic they are of."""

    templates: tuple[str, ...]
    fill: Callable[[random.Random], Row]
    topic: str = ""
    answers: tuple[str, ...] = ()

    def say(self, row: Row, lang: str) -> str:
        return said(self.templates[LANGUAGES.index(lang)], row, lang)

    def answer(self, row: Row, lang: str) -> str:
        return said(self.answers[LANGUAGES.index(lang)], row, lang)

    def key(self, row: Row) -> str:
        """The same for the same meaning in all languages."""
        return self.say(row, "en")


def _pick(**words: list[Word]) -> Callable[[random.Random], Row]:
    """A different row of each list; lists that are the same one give different rows."""

    def fill(rng: random.Random) -> Row:
        row: Row = {}
        for name, choices in words.items():
            row[name] = rng.choice([word for word in choices if word not in row.values()])
        return row

    return fill


_OBJECTS = lexicon.ANIMALS + lexicon.THINGS
_COUNTS = lexicon.NUMBERS[2:11]


def _digits(rng: random.Random) -> Row:
    """One to six digits, as one word."""
    digits = rng.choices(lexicon.NUMBERS[:10], k=rng.randint(1, 6))
    return {"digits": {lang: {"one": " ".join(digit[lang]["m"] for digit in digits)} for lang in LANGUAGES}}


SENTENCES = (
    Frame(
        _templates("the {n} is {place} | {n.the} está {place} | {n.the} est {place} | {n.the} è {place} | {n} {place}"),
        _pick(n=_OBJECTS, place=lexicon.PLACES),
        "home",
    ),
    Frame(
        _templates(
            "{switch} {device} {room} {when} | {switch} {device} {room} {when} | {switch} {device} {room} {when} | "
            "{switch} {device} {room} {when} | {switch} {device} {room} {when}"
        ),
        _pick(switch=lexicon.SWITCHES, device=lexicon.DEVICES, room=lexicon.ROOMS, when=lexicon.PRESENT + lexicon.DAYS),
        "home",
    ),
    Frame(
        _templates(
            "the {n} is {a} and {b} | {n.the} es {a@n} y {b@n} | {n.the} est {a@n} et {b@n} | {n.the} è {a@n} e {b@n} "
            "| {n} {a@n} и {b@n}"
        ),
        _pick(n=_OBJECTS, a=lexicon.QUALITIES + lexicon.COLOURS, b=lexicon.QUALITIES),
    ),
    Frame(
        _templates(
            "{p} {v} a {c} {n} {when} | {p} {v} {n.a} {c@n} {when} | {p} {v} {n.a} {c@n} {when} | "
            "{p} {v} {n.a} {c@n} {when} | {p} {v@p} {c.acc@n} {n.acc} {when}"
        ),
        _pick(p=lexicon.PEOPLE, v=lexicon.PAST_VERBS, c=lexicon.COLOURS, n=_OBJECTS, when=lexicon.PAST + lexicon.DAYS),
    ),
    Frame(
        _templates(
            "{when} {a} and {b} in {city} | {when} {a} y {b} en {city} | {when} {a} et {b} à {city} | "
            "{when} {a} e {b} a {city} | {when} {a} и {b} в {city.in}"
        ),
        _pick(when=lexicon.PRESENT + lexicon.DAYS, a=lexicon.WEATHER, b=lexicon.WEATHER, city=lexicon.CITIES),
        "weather",
    ),
    Frame(
        _templates(
            "{p} goes to {city} {by} {when} | {p} va a {city} {by} {when} | {p} va à {city} {by} {when} | "
            "{p} va a {city} {by} {when} | {p} едет в {city.to} {by} {when}"
        ),
        _pick(p=lexicon.PEOPLE, city=lexicon.CITIES, by=lexicon.VEHICLES, when=lexicon.PRESENT + lexicon.DAYS),
        "travel",
    ),
    Frame(
        _templates(
            "{p} {v} {a} and {b} {meal} | {p} {v} {a} y {b} {meal} | {p} {v} {a} et {b} {meal} | "
            "{p} {v} {a} e {b} {meal} | {p} {v} {a} и {b} {meal}"
        ),
        _pick(p=lexicon.PEOPLE, v=lexicon.FOOD_VERBS, a=lexicon.FOODS, b=lexicon.FOODS, meal=lexicon.MEALS),
        "food",
    ),
    Frame(
        _templates(
            "call {p} {hour} {day} | llama {p.to} {hour} {day} | appelle {p} {hour} {day} | chiama {p} {hour} {day} | "
            "позвони {p.to} {hour} {day}"
        ),
        _pick(p=lexicon.PEOPLE, hour=lexicon.HOURS, day=lexicon.DAYS),
        "people",
    ),
    Frame(
        _templates(
            "{p} is {a} {when} | {p} está {a@p} {when} | {p} est {a@p} {when} | {p} è {a@p} {when} | {p} {a@p} {when}"
        ),
        _pick(p=lexicon.PEOPLE, a=lexicon.FEELINGS, when=lexicon.PRESENT + lexicon.DAYS),
        "people",
    ),
    Frame(
        _templates(
            "{p} has {k} {n.many} | {p} tiene {k} {n.many} | {p} a {k} {n.many} | {p} ha {k} {n.many} | "
            "у {p.of} {k@n} {n*k}"
        ),
        _pick(p=lexicon.PEOPLE, k=_COUNTS, n=_OBJECTS),
        "numbers",
    ),
    Frame(
        _templates(
            "the number is {digits} | el número es {digits} | le numéro est {digits} | il numero è {digits} | "
            "номер {digits}"
        ),
        _digits,
        "numbers",
    ),
)


@dataclass(frozen=True)
class Claims:
    """Claims of one kind about different things, how one is asked for and the answer, in the order of LANGUAGES.

    `{n}` is the thing, `{v}` what is said of it, one of `values`.
    """

    claim: tuple[str, ...]
    question: tuple[str, ...]
    answers: tuple[str, ...]
    values: list[Word]

    def draw(self, rng: random.Random, count: int) -> list[Row]:
        """The rows of `count` claims."""
        things, values = rng.sample(_OBJECTS, count), rng.sample(self.values, count)
        return [{"n": thing, "v": value, "w": _BOUGHT} for thing, value in zip(things, values, strict=True)]

    def tell(self, rows: list[Row], lang: str) -> str:
        at = LANGUAGES.index(lang)
        return f" {_AND[at]} ".join(said(self.claim[at], row, lang) for row in rows)

    def ask(self, row: Row, lang: str) -> str:
        return said(self.question[LANGUAGES.index(lang)], row, lang)

    def reply(self, row: Row, lang: str) -> str:
        return said(self.answers[LANGUAGES.index(lang)], row, lang)

    def fill(self, rng: random.Random) -> tuple[list[Row], Row]:
        """Two claims, and the one that is asked for."""
        rows = self.draw(rng, 2)
        return rows, rng.choice(rows)

    def say(self, filled: tuple[list[Row], Row], lang: str) -> str:
        return f"{self.tell(filled[0], lang)} {self.ask(filled[1], lang)}"

    def answer(self, filled: tuple[list[Row], Row], lang: str) -> str:
        return self.reply(filled[1], lang)

    def key(self, filled: tuple[list[Row], Row]) -> str:
        """The claims alone: what else is asked of them belongs to the same part."""
        return self.tell(filled[0], "en")


_AND = _templates("and | y | et | e | а")
_BOUGHT = lexicon.PAST_VERBS[0]

CLAIMS = (
    Claims(
        _templates("the {n} is {v} | {n.the} está {v} | {n.the} est {v} | {n.the} è {v} | {n} {v}"),
        _templates("where is the {n} | dónde está {n.the} | où est {n.the} | dov'è {n.the} | где {n}"),
        _templates("{v} | {v} | {v} | {v} | {v}"),
        lexicon.PLACES,
    ),
    Claims(
        _templates("the {n} is {v} | {n.the} es {v@n} | {n.the} est {v@n} | {n.the} è {v@n} | {n} {v@n}"),
        _templates(
            "what colour is the {n} | de qué color es {n.the} | de quelle couleur est {n.the} | "
            "di che colore è {n.the} | какого цвета {n}"
        ),
        _templates("{v} | {v@n} | {v@n} | {v@n} | {v@n}"),
        lexicon.COLOURS,
    ),
    Claims(
        _templates(
            "{v} bought the {n} | {v} compró {n.the} | {v} a acheté {n.the} | {v} ha comprato {n.the} | "
            "{v} {w@v} {n.acc}"
        ),
        _templates(
            "what was bought by {v} | qué compró {v} | qu'a acheté {v} | che cosa ha comprato {v} | что {w@v} {v}"
        ),
        _templates("the {n} | {n.the} | {n.the} | {n.the} | {n.acc}"),
        lexicon.PEOPLE,
    ),
)


def _sum(rng: random.Random) -> Row:
    """Two numbers from 2 to 10 and their sum, which is 12 at most."""
    first = rng.randint(2, 10)
    second = rng.randint(2, 12 - first)
    numbers = lexicon.NUMBERS
    return {"n": rng.choice(_OBJECTS), "i": numbers[first], "k": numbers[second], "r": numbers[first + second]}


def _more(rng: random.Random) -> Row:
    row = _pick(n=_OBJECTS, a=lexicon.PEOPLE, b=lexicon.PEOPLE, i=_COUNTS, k=_COUNTS)(rng)
    return {**row, "r": row["a" if _COUNTS.index(row["i"]) > _COUNTS.index(row["k"]) else "b"]}


def _opposite(rng: random.Random) -> Row:
    first = rng.randrange(len(lexicon.QUALITIES))
    words = {"i": lexicon.QUALITIES[first], "r": lexicon.QUALITIES[first ^ 1]}
    return {"n": rng.choice(_OBJECTS), "w": lexicon.PRONOUNS[0], **words}


class Question(Protocol):
    """What is asked and answered; `fill` draws what it is about, which the others are given."""

    def fill(self, rng: random.Random) -> Any: ...
    def say(self, filled: Any, lang: str) -> str: ...
    def answer(self, filled: Any, lang: str) -> str: ...
    def key(self, filled: Any) -> str: ...


QUESTIONS: tuple[Question, ...] = (
    *CLAIMS,
    Frame(
        _templates(
            "how many are {i} {n.many} and {k} {n.many} | cuánto suman {i} {n.many} y {k} {n.many} | "
            "combien font {i} {n.many} et {k} {n.many} | quanti sono {i} {n.many} e {k} {n.many} | "
            "сколько будет {i@n} {n*i} и {k@n} {n*k}"
        ),
        _sum,
        answers=_templates("{r} | {r} | {r} | {r} | {r}"),
    ),
    Frame(
        _templates(
            "{a} has {i} {n.many} and {b} has {k} who has more {n.many} | "
            "{a} tiene {i} {n.many} y {b} tiene {k} quién tiene más {n.many} | "
            "{a} a {i} {n.many} et {b} en a {k} qui a plus de {n.many} | "
            "{a} ha {i} {n.many} e {b} ne ha {k} chi ha più {n.many} | "
            "у {a.of} {i@n} {n*i} а у {b.of} {k@n} у кого больше {n.many}"
        ),
        _more,
        answers=_templates("{r} | {r} | {r} | {r} | у {r.of}"),
    ),
    Frame(
        _templates(
            "how is the {n} if it is not {i} | "
            "cómo es {n.the} si no es {i@n} | "
            "comment est {n.the} si {w@n} n'est pas {i@n} | "
            "com'è {n.the} se non è {i@n} | "
            "что за {n} если не {i@n}"
        ),
        _opposite,
        answers=_templates("{r} | {r@n} | {r@n} | {r@n} | {r@n}"),
    ),
)


@dataclass(frozen=True)
class Fact:
    """What is told, what is said to it, how it is asked for and the answer, each in the order of CHAT_LANGUAGES."""

    told: tuple[str, ...]
    reply: tuple[str, ...]
    asked: tuple[str, ...]
    answer: tuple[str, ...]
    fill: Callable[[random.Random], Row]


def _code(rng: random.Random) -> Row:
    first, second = rng.choices(lexicon.NUMBERS[:10], k=2)
    return {"a": first, "b": second}


FACTS = (
    Fact(
        _templates("my {n} is called {name} | mi {n} se llama {name}"),
        ("a nice name", "un nombre bonito"),
        _templates("what is my {n} called | cómo se llama mi {n}"),
        _templates("{name} | {name}"),
        _pick(n=lexicon.ANIMALS, name=lexicon.NAMES),
    ),
    Fact(
        _templates("my {n} is {c} | mi {n} es {c@n}"),
        ("a nice colour", "un color bonito"),
        _templates("what colour is my {n} | de qué color es mi {n}"),
        _templates("{c} | {c@n}"),
        _pick(n=lexicon.THINGS, c=lexicon.COLOURS),
    ),
    Fact(
        _templates("my {n} is {place} | mi {n} está {place}"),
        ("good to know", "bueno es saberlo"),
        _templates("where is my {n} | dónde está mi {n}"),
        _templates("{place} | {place}"),
        _pick(n=_OBJECTS, place=lexicon.PLACES),
    ),
    Fact(
        _templates("{p} lives in {city} | {p} vive en {city}"),
        ("a nice city", "una ciudad bonita"),
        _templates("where does {p} live | dónde vive {p}"),
        _templates("in {city} | en {city}"),
        _pick(p=lexicon.PEOPLE, city=lexicon.CITIES),
    ),
    Fact(
        _templates("i will meet {p} {hour} | voy a ver {p.to} {hour}"),
        ("do not be late", "no llegues tarde"),
        _templates("when will i meet {p} | cuándo voy a ver {p.to}"),
        _templates("{hour} | {hour}"),
        _pick(p=lexicon.PEOPLE, hour=lexicon.HOURS),
    ),
    Fact(
        _templates("my number is {a} {b} | mi número es {a} {b}"),
        ("i will remember it", "lo recordaré"),
        _templates("what is my number | cuál es mi número"),
        _templates("{a} {b} | {a} {b}"),
        _code,
    ),
)
# Turns that tell nothing.
SMALL_TALK = {
    "en": (("good morning", "good morning"), ("how are you", "very well"), ("thank you", "you are welcome")),
    "es": (("buenos días", "buenos días"), ("cómo estás", "muy bien"), ("gracias", "de nada")),
}
