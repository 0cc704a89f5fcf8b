"""Lessons of the small world and of the quickstart's sentences, for the embedded default."""

import random
from collections.abc import Iterator

from rwkv_speech.synthetic import corpus, world
from rwkv_speech.synthetic.grammar import CHAT_LANGUAGES
from rwkv_speech.synthetic.lessons import NAMES, SEPARATOR, Lesson, Turn
from rwkv_speech.synthetic.phones import LANGUAGES

# How often each kind of lesson comes.
_SHARES = {
    "corpus": 11, "salad": 4, "asr": 11, "st": 12, "qa": 26, "follow_ups": 18, "written_first": 6, "topic": 2,
    "chat": 7, "lang": 1, "text": 2,
}  # fmt: skip
# Of the lessons of a kind, so many give what is said as text. To find what was asked for is learned from text, of which
# a lesson is short, and then serves speech too.
_READ, _OFTEN_READ = 0.15, {"qa": 0.75, "follow_ups": 0.75, "written_first": 0.0}


class WorldLessons:
    """Recognition in five languages, translation, questions, topics, conversations, each under its instruction."""

    def __init__(self) -> None:
        self._words = {lang: world.words(lang) for lang in LANGUAGES}
        self._corpus_words = corpus.words()

    def draw(self, rng: random.Random, held_out: bool = False) -> Lesson:
        """One lesson; of the world's test lines it is for scoring alone."""
        part = "test" if held_out else "train"
        (kind,) = rng.choices(list(_SHARES), list(_SHARES.values()))
        heard = rng.random() >= _OFTEN_READ.get(kind, _READ)
        # English and Spanish are those that the demos translate between.
        lang, other = (rng.choice(("en", "es")) if rng.random() < 0.5 else rng.choice(LANGUAGES) for _ in range(2))
        if kind in ("corpus", "salad"):
            text = self._english(rng) if kind == "corpus" else self._salad(rng)
            return Lesson(rng.choice(["", "", "en: "]), (Turn(text, "en", text, heard),))
        if kind == "text":
            return Lesson("", (Turn("", lang, world.draw(rng, "asr", lang, None, part).text),))
        if kind == "lang":
            return Lesson("lang: ", (Turn(world.draw(rng, "asr", lang, None, part).said, lang, NAMES[lang], heard),))
        if kind == "asr":
            line = self._salad_line(rng) if rng.random() < 0.2 else world.draw(rng, "asr", lang, None, part)
            return Lesson(rng.choice(["", f"{line.lang}: "]), (Turn(line.said, line.lang, line.text, heard),))
        if kind == "st":
            other = other if other != lang else rng.choice([code for code in LANGUAGES if code != lang])
            line = world.draw(rng, "st", lang, other, part)
            return Lesson(f"{other}: ", (Turn(line.said, lang, line.text, heard),))
        if kind == "chat":
            lang = rng.choice(CHAT_LANGUAGES)
        elif rng.random() < 0.7:
            lang = "en"
        if kind == "written_first":  # the question, and then the answer to what was written
            line = world.draw(rng, "qa", lang, None, part)
            written = f"{line.said}{SEPARATOR}{line.text}"
            return Lesson("first: ", (Turn(line.said, lang, written, heard),))
        if kind == "follow_ups":
            turns = world.follow_ups(rng, lang, part)
            return Lesson("answer: ", tuple(Turn(said, lang, text, heard) for said, text in turns))
        line = world.draw(rng, kind, lang, None, part)
        instruction = {"qa": "answer: ", "topic": "topic: ", "chat": "chat: "}[kind]
        turns = [*line.before, (line.said, line.text)]
        return Lesson(instruction, tuple(Turn(said, lang, text, heard) for said, text in turns))

    def texts(self) -> Iterator[str]:
        """Sentences of all languages, and every word."""
        rng = random.Random(0)
        for lang in LANGUAGES:
            yield from (f" {word}" for word in self._words[lang])
            yield from self._words[lang]
            for _ in range(4000):
                yield from (world.draw(rng, task, lang, lang).text for task in ("asr", "qa"))
        for _ in range(20_000):
            yield corpus.sentence(rng)
        for word in self._corpus_words * 50:
            yield f" {word}"

    def _english(self, rng: random.Random) -> str:
        return " ".join(rng.choices(corpus.DIGITS, k=rng.randint(1, 8))) if rng.random() < 0.4 else corpus.sentence(rng)

    def _salad(self, rng: random.Random) -> str:
        return corpus.word_salad(rng, self._corpus_words)

    def _salad_line(self, rng: random.Random) -> world.Line:
        """Words in no order, so that listening pays, not guessing."""
        lang = rng.choice(LANGUAGES)
        text = " ".join(rng.choices(self._words[lang], k=rng.randint(1, 7)))
        return world.Line("asr", text, lang, text, lang)
