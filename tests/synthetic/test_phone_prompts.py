import random
from difflib import SequenceMatcher

import numpy as np
import pytest

from rwkv_speech.synthetic.phone_prompts import Speaker, blends, frames
from rwkv_speech.synthetic.phones import PHONES


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker()


def heard(labels: list[int]) -> str:
    return "".join(PHONES[x] for i, x in enumerate(labels) if x and (i == 0 or x != labels[i - 1]))


def test_prompts_follow_the_phones(speaker: Speaker):
    said = speaker.say("two", "en", 0)
    labels = frames(said, random.Random(5), difficulty=0.0)
    assert heard(labels) == "tu"
    shares = blends(labels, 3)
    assert shares.shape == (len(labels) // 3, len(PHONES)) and shares.sum(1) == pytest.approx(1.0)


def test_slips_grow_with_difficulty(speaker: Speaker):
    said, rng = speaker.say("the weather is good today", "en", 1), random.Random(1)
    clean = heard(frames(said, rng, 0.0))
    wrong = [heard(frames(said, rng, difficulty)) != clean for difficulty in (0.0, 1.0) for _ in range(50)]
    assert sum(wrong[:50]) < 15 and sum(wrong[50:]) > 30  # a phone that is shorter than a frame may be missed


def test_a_prompt_of_words_and_of_a_sentence(speaker: Speaker):
    """Both ways of joining give the phones in order, in any language."""
    for text, lang, wanted in (("uno dos", "es", "unodos"), ("my father", "en", "mafɑðɜ")):
        found = set[str]()
        for seed in range(30):
            shares = speaker.prompt(text, lang, random.Random(seed), 0.0)
            names = [PHONES[i] for i in shares.argmax(1) if i]
            found.add("".join(name for i, name in enumerate(names) if i == 0 or name != names[i - 1]))
            assert np.allclose(shares.sum(1), 1)
        assert max(SequenceMatcher(None, wanted, name).ratio() for name in found) > 0.75


def test_silent_text_is_a_prompt_too(speaker: Speaker):
    assert speaker.prompt("...", "en", random.Random(0)).shape[1] == len(PHONES)
