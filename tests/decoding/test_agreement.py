import random

from rwkv_speech.decoding.agreement import Agreement
from rwkv_speech.decoding.results import Word


def words(text: str, *ends: float) -> list[Word]:
    starts = [0.0, *ends]
    return [Word(f" {x}", start, end, 1.0) for x, start, end in zip(text.split(), starts, ends, strict=False)]


def names(found: list[Word]) -> str:
    return "".join(word.word for word in found).strip()


def test_a_word_is_committed_when_two_readings_agree_and_it_ended_long_enough_ago():
    agreement = Agreement(hold=0.5)
    assert names(agreement.add(words("one two", 0.4, 0.8), 2.0)) == ""  # nobody agrees yet
    assert names(agreement.add(words("one too three", 0.4, 0.8, 1.2), 2.3)) == "one"  # they differ in the second
    assert names(agreement.add(words("one too three", 0.4, 0.8, 2.2), 2.6)) == "too"  # the third has just ended
    assert names(agreement.add(words("one too three", 0.4, 0.8, 2.2), 2.7)) == "three"
    assert names(agreement.committed) == "one too three"


def test_a_word_waits_for_those_before_it():
    agreement = Agreement(hold=0.5)
    agreement.add(words("a b c", 1.0, 1.1, 1.2), 9.0)
    assert agreement.add(words("x b c", 1.0, 1.1, 1.2), 9.0) == []
    assert names(agreement.add(words("x b c", 1.0, 1.1, 1.2), 9.0)) == "x b c"


def test_end_piece_gives_the_words_of_the_piece_and_keeps_those_behind_it():
    agreement = Agreement(hold=0.0)
    agreement.add(words("a b c", 1.0, 2.0, 3.0), 9.0)
    agreement.add(words("a b c", 1.0, 2.0, 3.0), 9.0)
    assert names(agreement.end_piece(2.4)) == "a b" and names(agreement.committed) == "c"
    # What follows is compared with readings of the new piece alone.
    assert agreement.add(words("c d", 1.0, 2.0), 9.0) == []
    assert names(agreement.add(words("c d", 1.0, 2.0), 9.0)) == "d"
    assert names(agreement.end_piece()) == "c d" and agreement.committed == []


def test_a_word_that_was_hardly_heard_waits_three_times_as_long():
    agreement = Agreement(hold=0.5)
    heard = [Word("the", 0.0, 1.0, 0.6), Word(" end", 1.0, 2.0, 0.4), Word(" is", 2.0, 2.1, 0.6)]
    agreement.add(heard, 2.0)
    assert names(agreement.add(heard, 3.0)) == "the"
    assert names(agreement.add(heard, 3.4)) == "" and names(agreement.add(heard, 3.6)) == "end is"


def test_of_any_readings_committed_words_only_grow_and_were_read_twice():
    rng = random.Random(0)
    num_committed = 0
    for _ in range(300):
        hold, now = rng.choice([0.0, 0.3]), 0.0
        readings = [list[Word]()]
        agreement = Agreement(hold)
        for _ in range(12):
            now += 0.3
            before = list(agreement.committed)
            others = [
                Word(rng.choice("ab"), 0.0, rng.uniform(0, now), rng.random()) for _ in range(rng.randrange(1, 5))
            ]
            readings.append([*before, *others])
            new = agreement.add(readings[-1], now)
            assert agreement.committed == before + new == readings[-1][: len(before) + len(new)]
            assert all(word.end <= now - (hold if word.probability >= 0.5 else 3 * hold) for word in new)
            for place, word in enumerate(new, len(before)):
                assert readings[-2][place].word == word.word
            num_committed += len(new)
    assert num_committed > 500  # else the case would be empty
