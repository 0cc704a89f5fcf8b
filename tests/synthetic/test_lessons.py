import random
from collections import Counter

from rwkv_speech.synthetic.lessons import Lesson, Lessons, MixedLessons, TextLessons
from rwkv_speech.synthetic.texts import Lines, is_held_out

ROWS = [(f"line {i}", f"línea {i}", "" if i % 2 else f"строка {i}") for i in range(400)]
PARALLEL = Lines("a", ("en", "es", "ru"), ROWS, 1.0)
GERMAN = Lines("b", ("de",), [("ein Satz",), ("noch einer",)] * 100, 1.0)


def drawn(lessons: Lessons, held_out: bool = False) -> list[Lesson]:
    rng = random.Random(0)
    return [lessons.draw(rng, held_out) for _ in range(2000)]


def test_text_lessons_write_the_line_or_its_translation():
    table = {text: dict(zip(PARALLEL.langs, row, strict=True)) for row in ROWS for text in row if text}
    kinds = Counter[str]()
    for lesson in drawn(TextLessons([PARALLEL])):
        (turn,) = lesson.turns
        if not turn.said:
            kinds["text"] += 1
            continue
        if lesson.instruction == "lang: ":
            assert turn.text == {"en": "English", "es": "Spanish", "ru": "Russian"}[turn.lang]
            continue
        target = lesson.instruction.removesuffix(": ") or turn.lang
        assert table[turn.said][target] == turn.text and table[turn.said][turn.lang] == turn.said
        kinds["asr" if target == turn.lang else "heard" if turn.heard else "read"] += 1
    assert all(kinds[kind] > 150 for kind in ("text", "asr", "heard", "read"))


def test_held_out_lines_are_drawn_for_scoring_alone():
    lessons = TextLessons([PARALLEL])
    held = {text for row in ROWS if is_held_out(row) for text in row if text}
    assert all(lesson.turns[0].said not in held for lesson in drawn(lessons))
    assert {lesson.turns[0].said for lesson in drawn(lessons, True)} <= held | {""}
    assert not held & {text.strip() for text in lessons.texts()}


def test_a_language_without_a_voice_is_text_alone():
    assert all(lesson.turns[0].said == "" for lesson in drawn(TextLessons([GERMAN])))


def test_sources_come_by_their_shares_and_texts_by_their_weights():
    english = Lines("c", ("en",), [("one",)] * 60, 3.0)
    mixed = MixedLessons([(TextLessons([PARALLEL]), 1.0), (TextLessons([english]), 3.0)])
    count = sum("one" in lesson.turns[0].text or lesson.turns[0].said == "one" for lesson in drawn(mixed))
    assert 1300 < count < 1650
    assert Counter(TextLessons([english]).texts())["one"] == 3 * len(english.kept().rows)
