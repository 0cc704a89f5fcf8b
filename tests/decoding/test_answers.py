from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rwkv_speech.decoding.answers import Answer, answers
from rwkv_speech.decoding.options import Options
from rwkv_speech.models.families import read_lm
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.state import State
from rwkv_speech.tokenizer import WorldTokenizer

PROMPTS = ["User: what is the weather?\n\nAssistant:", "x", "the weather is good", "User: hi\n\nAssistant:", "abc d"]


@pytest.fixture(scope="module")
def tokenizer(tiny_parts: Parts) -> WorldTokenizer:
    return WorldTokenizer(tiny_parts.vocabulary())


@pytest.fixture(scope="module", params=["auto", "torch", "x070"])
def lm(tiny_parts: Parts, rwkv7_parts: Parts, request: pytest.FixtureRequest) -> RWKV:
    if request.param == "x070":
        return read_lm(rwkv7_parts.base_file())
    return read_lm(tiny_parts.base_file(), form=request.param)


def plain(lm: RWKV, tokenizer: WorldTokenizer, prompt: str, limit: int) -> str:
    """The likeliest token again and again, each time after reading the whole text anew."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    while len(ids) - start < limit:
        token = int(lm(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        if b"\n\n" in tokenizer.decode_bytes(ids[start:]):
            break
    return tokenizer.decode_bytes(ids[start:]).partition(b"\n\n")[0].decode("utf-8", "ignore")


def told(found: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in sorted(found)]


def test_greedy_answers_equal_a_plain_loop(lm: RWKV, tokenizer: WorldTokenizer):
    options = Options.given(0.0, max_new_tokens=12)
    wanted = [plain(lm, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert told(list(answers(lm, tokenizer, PROMPTS, options, 2))) == wanted and len(set(wanted)) > 2


def test_sampled_answers_depend_on_prompt_and_seed_alone(lm: RWKV, tokenizer: WorldTokenizer):
    options = Options.given(1.0, top_p=0.9, max_new_tokens=9)
    found = told(list(answers(lm, tokenizer, PROMPTS, options, 3, seed=1)))
    assert told(list(answers(lm, tokenizer, PROMPTS[::-1], options, 1, seed=1))) == found[::-1]
    assert told(list(answers(lm, tokenizer, PROMPTS, options, 3, seed=2))) != found


class Chain:
    """A language model whose next token hangs on the last one alone."""

    def __init__(self, follows: dict[int, int], vocab: int) -> None:
        self.follows, self.vocab = follows, vocab

    def zero_state(self, batch: int) -> State:
        return State(*(torch.zeros(1, batch, 1) for _ in range(3)))

    def step(self, input_ids: torch.Tensor, state: State, slots: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(input_ids), self.vocab)
        for row, token in enumerate(input_ids.tolist()):
            logits[row, self.follows[token]] = 9
        return logits


def test_an_answer_ends_at_an_empty_line_at_the_end_of_text_and_at_the_limit(tokenizer: WorldTokenizer):
    (a, b, c, d, e), line = tokenizer.encode("abcde"), tokenizer.encode("\n")[0]
    model: Any = Chain({a: b, b: line, line: line, c: 0, d: e, e: d}, tokenizer.vocab_size)
    found = sorted(answers(model, tokenizer, ["a", "c", "d"], Options.given(0.0, max_new_tokens=5), 2))
    assert found == [Answer(0, "b", False), Answer(1, "", False), Answer(2, "edede", True)]
