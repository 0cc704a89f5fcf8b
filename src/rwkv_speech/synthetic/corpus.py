"""Sentences of the tiny default: a small grammar over everyday words, digit strings, and made-up words."""

import random
from collections.abc import Callable

DIGITS = "zero one two three four five six seven eight nine".split()

_ADJECTIVES = (
    "good bad big small old new red blue green white black warm cold dark bright clean empty full long short "
    "happy quiet loud heavy soft strong sweet fresh young tall"
).split()
_PEOPLE = "mother father sister brother teacher doctor farmer friend neighbor child woman man".split()
_ANIMALS = "dog cat horse bird fish cow sheep mouse".split()
_THINGS = (
    "house car book table chair window door letter garden river mountain bridge train boat road city village "
    "kitchen school market flower tree apple bread water milk coffee lamp clock radio phone music picture box"
).split()
_ROOMS = "kitchen bedroom bathroom garden office garage hallway".split()
_DEVICES = "light lamp radio heater television fan music alarm".split()
_WEATHER = "good bad warm cold dry wet cloudy sunny windy stormy".split()
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_TIMES = "today tomorrow tonight now later".split()
_PAST = "saw found bought sold opened closed cleaned painted carried followed watched remembered".split()
_PLACES = "near behind under beside".split()
_HOURS = "one two three four five six seven eight nine ten eleven twelve".split()

# Words that the language model and the encoder meet in pretraining only, so that a new task has room to grow.
_EXTRA = (
    "about after again always answer arrive because before begin believe between breakfast brother button camera "
    "change cheese chicken circle coat corner count cousin dance decide dinner dollar dream drive early earth "
    "evening every family finger finish flight floor forest forget glass gold hand heart history hotel hour hundred "
    "island judge jump kind language laugh learn listen lunch machine maybe measure minute moment money morning "
    "never north number ocean orange paper people pepper person piano please police pleasure question quick rain "
    "reason ring room salt season shoulder silver simple sing sleep snow south spoon spring square station stone "
    "story street sugar summer thank thing thousand thumb together travel treasure under usual valley vision voice "
    "wait walk which winter wolf wonder world write yellow yes yesterday no"
).split()


def sentence(rng: random.Random) -> str:
    """One sentence of the default corpus, lower case, without punctuation, 1 to 12 words."""
    one = rng.choice
    kinds: tuple[Callable[[], str], ...] = (
        lambda: " ".join(rng.choices(DIGITS, k=rng.randint(1, 7))),
        lambda: (
            f"the weather {one(['is', 'was'])} {one(_WEATHER)} {one(['and', 'but'])} {one(_WEATHER)} "
            f"{one(['today', 'yesterday', 'on ' + one(_DAYS)])}"
        ),
        lambda: (
            f"{one(['please ', ''])}turn {one(['on', 'off'])} the {one(_DEVICES)} in the {one(_ROOMS)}"
            f"{one(['', ' ' + one(_TIMES)])}"
        ),
        lambda: (
            f"{one(['the', 'my', 'your', 'our'])} {one(_PEOPLE)} {one(_PAST)} {one(['a', 'the'])} {one(_ADJECTIVES)} "
            f"{one(_THINGS + _ANIMALS)}"
        ),
        lambda: (
            f"the {one(_ADJECTIVES)} {one(_ANIMALS + _PEOPLE)} {one(['is', 'was', 'sleeps', 'waits'])} "
            f"{one(_PLACES)} the {one(_ADJECTIVES)} {one(_THINGS)}"
        ),
        lambda: (
            f"{one(['call', 'meet', 'visit', 'ask'])} the {one(_PEOPLE)} on {one(_DAYS)} at {one(_HOURS)}"
            f"{one(['', ' thirty', ' fifteen'])}"
        ),
        lambda: (
            f"{one(['where', 'who', 'when'])} {one(_PAST)} {one([*DIGITS[1:], 'many', 'some'])} {one(_ADJECTIVES)} "
            f"{one(_PEOPLE)}"
        ),
    )
    return one(kinds)()


def words() -> list[str]:
    """Every word that the tiny language model knows, sorted; the default corpus uses the greater part of them."""
    rng = random.Random(0)
    grammar = {word for _ in range(20000) for word in sentence(rng).split()}
    return sorted(grammar | set(_EXTRA) | set(DIGITS))


def word_salad(rng: random.Random, vocabulary: list[str]) -> str:
    """Two to eight words in no order, so that nothing can be guessed from the grammar."""
    return " ".join(rng.choices(vocabulary, k=rng.randint(2, 8)))


_ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr tw v w "
    "wh y z"
).split()
_VOWELS = "a e i o u ai ay ea ee ie oa oi oo ou ow oy ar er ir or ur".split()
_CODAS = ["", *"b ck d f g k l ll m n nd ng nk nt p r rd rk rn rt s sh sk sp ss st t tch th v x z".split()]


def made_up_words(rng: random.Random) -> str:
    """Three to seven pronounceable words that do not exist: every phone in many contexts, for the encoder."""
    parts = (_ONSETS, _VOWELS, _CODAS)
    counts = (rng.randint(1, 3) for _ in range(rng.randint(3, 7)))
    return " ".join("".join(rng.choice(part) for _ in range(count) for part in parts) for count in counts)
