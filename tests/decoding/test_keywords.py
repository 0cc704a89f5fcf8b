"""Keywords: what a text earns in sum equals a search by regular expressions."""

import itertools
import random
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from sounds import samples, sounds

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.data.phrases import read_phrases
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.options import GREEDY, Options
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.parts import Parts
from rwkv_speech.tokenizer import WorldTokenizer

VOCAB = 272
Restrict = Callable[[dict[int, float]], SpeechLM]


@pytest.fixture(scope="module")
def tiny(tiny_parts: Parts) -> WorldTokenizer:
    return WorldTokenizer(tiny_parts.vocab_file)


def earned(keywords: Keywords, tokens: list[int], vocab: int) -> list[float]:
    """What each token and the end of the text change, step by step, as a decoder adds it."""
    nodes = keywords.walk(tokens)
    found = keywords.add(torch.zeros(len(nodes), vocab), nodes)
    return [round(float(row[token]), 4) for row, token in zip(found, [*tokens, 0], strict=True)]


def expected(phrases: dict[str, float], text: str, tokenizer: WorldTokenizer) -> float:
    """The weight of every token of every phrase that stands in a text as whole words."""
    tokens, ends = tokenizer.encode(text), [0]
    for token in tokens:
        ends.append(ends[-1] + len(tokenizer.decode_bytes([token])))
    total = 0.0
    for phrase, weight in phrases.items():
        for form in {phrase, phrase.lower(), phrase.upper()}:
            for match in re.finditer(rf"(?<!\w)(?={re.escape(form)}(?!\w))", text):
                start = len(text[: match.start()].encode())
                end = start + len(form.encode())
                total += weight * sum(a < end and b > start for a, b in itertools.pairwise(ends))
    return total


WORDS = ["the", "weather", "is", "good", "the-re", "goods", "a", "isle", "Is", "é", "le"]


def test_a_text_earns_the_tokens_of_the_listed_phrases_in_it(tiny: WorldTokenizer):
    rng, seen = random.Random(0), 0
    for _ in range(60):
        phrases = {" ".join(rng.choices(WORDS, k=rng.randint(1, 3))): rng.choice([0.5, 1, 2]) for _ in range(4)}
        # A phrase of two spellings has one weight here, for the oracle's sake.
        phrases = {phrase.lower(): weight for phrase, weight in phrases.items()}
        keywords = Keywords(phrases, tiny, VOCAB)
        for _ in range(10):
            blanks = rng.choices([" ", "", "-", ". ", '"', "  "], [9, 1, 1, 1, 1, 1], k=8)
            text = "".join(rng.choice(WORDS) + blank for blank in blanks)
            found = sum(earned(keywords, tiny.encode(text), VOCAB))
            assert found == pytest.approx(expected(phrases, text, tiny), abs=1e-3), (phrases, text)
            seen += found > 0
    assert seen > 200


def test_a_text_earns_the_same_with_the_world_vocabulary():
    tokenizer, rng = WorldTokenizer(), random.Random(1)
    phrases = {"Mississauga": 2.0, "miss": 1.0, "Grünwald": 1.5, "new york city": 1.0, "york": 3.0, "cat": 2.0}
    keywords = Keywords(phrases, tokenizer, 65_536)
    words = [
        "Mississauga",
        "MISSISSAUGA",
        "miss",
        "missing",
        "Grünwald",
        "new",
        "york",
        "city",
        "cat",
        "category",
        "we",
    ]
    for _ in range(40):
        text = " ".join(rng.choices(words, k=6)) + rng.choice(["", ".", "'s", "-"])
        found = sum(earned(keywords, tokenizer.encode(text), 65_536))
        assert found == pytest.approx(expected(phrases, text, tokenizer), abs=1e-3), text


def test_a_started_phrase_earns_at_once_and_gives_back_what_does_not_complete(tiny: WorldTokenizer):
    keywords = Keywords({"the weather is": 1.0}, tiny, VOCAB)
    whole, left = tiny.encode(" the weather is"), tiny.encode(" the weather good")
    assert earned(keywords, whole, VOCAB) == [1, 1, 1, 0]
    assert earned(keywords, left, VOCAB) == [1, 1, -2, 0]
    assert earned(keywords, whole[:2], VOCAB) == [1, 1, -2]


def test_a_word_inside_another_earns_nothing():
    tokenizer = WorldTokenizer()
    keywords = Keywords({"cat": 2.0}, tokenizer, 65_536)
    cat, letters = tokenizer.encode(" cat")[0], tokenizer.encode("ness")
    assert sum(earned(keywords, [cat], 65_536)) == 2
    assert sum(earned(keywords, [cat, *letters], 65_536)) == 0
    assert sum(earned(keywords, tokenizer.encode("bobcat cats category"), 65_536)) == 0
    assert sum(earned(keywords, tokenizer.encode("CAT. (cat) Cat, cat"), 65_536)) == 6  # not "Cat"


def test_scripts_without_blanks_are_found_anywhere():
    tokenizer = WorldTokenizer()
    keywords = Keywords({"東京": 2.0, "สวัสดี": 1.0, "서울": 1.0}, tokenizer, 65_536)
    text = "我去東京都。 東京"
    assert sum(earned(keywords, tokenizer.encode(text), 65_536)) == 8
    assert sum(earned(keywords, tokenizer.encode("คำสวัสดีครับ"), 65_536)) >= 1
    assert sum(earned(keywords, tokenizer.encode("나는 서울에서"), 65_536)) >= 1  # a word with its particle


def test_rows_do_not_change_each_other_and_no_phrase_changes_nothing(tiny: WorldTokenizer):
    keywords = Keywords({"the weather": 1.0, "weather": 2.5, "is good": 0.5}, tiny, VOCAB)
    nodes = keywords.walk(tiny.encode("the weather is goodly the weather"))
    scores = torch.randn(len(nodes), VOCAB, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    together = keywords.add(scores, nodes)
    alone = torch.cat([keywords.add(scores[i : i + 1], nodes[i : i + 1]) for i in range(len(nodes))])
    assert torch.equal(together, alone) and torch.equal(scores, before)
    assert torch.equal(Keywords({}, tiny, VOCAB).add(scores, [Keywords.start] * len(nodes)), scores)


@torch.no_grad()
def logprobs(model: SpeechLM, sample: Sample, ids: Sequence[int]) -> list[float]:
    """Of each token and of the end (n + 1,), everything read again."""
    audio, _ = model.audio_tokens(collate([sample]))
    text = model.lm.embed(torch.tensor([model.separator_id, *ids]))
    output = model.lm(inputs_embeds=torch.cat((audio, text))[None], state=model.initial_state([sample.task]))
    found = output.logits[0, len(audio) :].double().log_softmax(-1)
    return [float(row[token]) for row, token in zip(found, [*ids, 0], strict=True)]


def test_a_beam_as_wide_as_the_space_finds_the_best_of_log_probability_and_keywords(restrict: Restrict):
    toy = {0: 1.5, 98: 1.0, 99: 1.0, 33: 1.0}  # the end, "a", "b" and the blank
    model, phrases = restrict(toy), {"a": 2.0, "ab": 1.0, "b a": 1.5}
    chosen = Options.given(0.0, beam=64, patience=10.0, keywords=[f"{x}\t{weight}" for x, weight in phrases.items()])
    for sample in samples(sounds([3_000, 6_000])):
        [done] = Engine(model, chosen, 1).run([Request(0, sample, 3)])
        scores = {}
        for length in range(4):
            for ids in itertools.product([token for token in toy if token], repeat=length):
                bonus = expected(phrases, model.tokenizer.decode(ids), model.tokenizer)
                scores[ids] = (sum(logprobs(model, sample, ids)) + bonus) / (length + 1)
        found = [text for text in done.hypotheses if text.score > -20 and not text.cut]  # of the toy's tokens
        assert [text.ids for text in found] == sorted(scores, key=lambda ids: -scores[ids])
        assert [text.score for text in found] == pytest.approx([scores[text.ids] for text in found], abs=1e-4)
        assert found[0].logprobs == pytest.approx(logprobs(model, sample, found[0].ids), abs=1e-4)  # the model's own


def test_greedy_takes_the_best_of_log_probability_and_keywords_in_every_slot(restrict: Restrict):
    model = restrict({0: -3.0, 33: 0.5} | dict.fromkeys(range(98, 124), 0.0))
    lines = ["bcd\t2", "x\t3", "the\t1", "qrs t\t2.5"]
    chosen, requests = Options.given(0.0, keywords=lines), samples(sounds([3_000, 6_000, 1_450, 5_555, 2_000, 9_000]))
    keywords = Keywords(read_phrases(chosen), model.tokenizer, VOCAB)
    plain = {done.request.key: done.hypotheses[0].ids for done in Engine(model, GREEDY, 2).run(jobs(requests))}
    differ = 0
    for done in Engine(model, chosen, 4).run(jobs(requests)):
        found = done.hypotheses[0].ids
        audio, _ = model.audio_tokens(collate([done.request.sample]))
        text = model.lm.embed(torch.tensor([model.separator_id, *found]))
        output = model.lm(inputs_embeds=torch.cat((audio, text))[None], state=model.initial_state(["asr"]))
        biased = keywords.add(output.logits[0, len(audio) :].log_softmax(-1), keywords.walk(found))
        assert biased[: len(found)].argmax(-1).tolist() == list(found)
        differ += found != plain[done.request.key]
    assert differ > 2


def jobs(chosen: list[Sample]) -> list[Request]:
    return [Request(i, sample, 12) for i, sample in enumerate(chosen)]
