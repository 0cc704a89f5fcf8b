from pathlib import Path

import pytest
import torch
from tiny_models import random_rwkv6_tensors
from torch import Tensor

from rwkv_speech.decoding.engine import greedy
from rwkv_speech.models.rwkv6 import RWKV6
from rwkv_speech.models.state import State

NEVER = -1  # no token has this id: nothing ends


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> RWKV6:
    path: Path = tmp_path_factory.mktemp("lm") / "base.pth"
    torch.save(random_rwkv6_tensors(), path)
    return RWKV6.from_pretrained(path)


@pytest.fixture(scope="module")
def prefixes(lm: RWKV6) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(1, 250, (n,), generator=draw).tolist() for n in (5, 1, 17, 9, 2, 30, 3, 12)]


def read(lm: RWKV6, prefixes: list[list[int]]) -> tuple[Tensor, State]:
    """The logits (B, V) after each prefix, and the states."""
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    output = lm(input_ids=torch.tensor([[i for prefix in prefixes for i in prefix]]), cu_seqlens=bounds)
    return output.logits[0, bounds[1:] - 1], output.state


@torch.no_grad()
def oracle(lm: RWKV6, prefix: list[int], limit: int, eos: int) -> tuple[list[int], bool]:
    """Reads everything again for every token, as no decoder should."""
    ids: list[int] = []
    while True:
        token = int(lm(input_ids=torch.tensor([prefix + ids])).logits[0, -1].argmax())
        if token == eos:
            return ids, False
        if len(ids) == limit:
            return ids, True
        ids.append(token)


@pytest.fixture(scope="module")
def endless(lm: RWKV6, prefixes: list[list[int]]) -> list[list[int]]:
    """24 tokens of each prefix, by the oracle."""
    return [oracle(lm, prefix, 24, NEVER)[0] for prefix in prefixes]


@pytest.fixture(scope="module")
def eos(endless: list[list[int]]) -> int:
    """The token that ends the most rows at different steps."""
    tokens = {token for ids in endless for token in ids}
    return max(sorted(tokens), key=lambda t: len({ids.index(t) for ids in endless if t in ids}))


def test_greedy_equals_reading_the_whole_prefix_again(lm: RWKV6, prefixes: list[list[int]], endless: list[list[int]]):
    for prefix, expected in zip(prefixes, endless, strict=True):
        ids, cut = greedy(lm, *read(lm, [prefix]), [24], NEVER)
        assert ids == [expected] and cut == [True]
    assert len({tuple(ids) for ids in endless}) > 1  # else the prefix would not matter


def test_greedy_rows_that_end_at_different_times_equal_each_alone(
    lm: RWKV6, prefixes: list[list[int]], endless: list[list[int]], eos: int
):
    limits = [24] * len(prefixes)
    ids, cut = greedy(lm, *read(lm, prefixes), limits, eos)
    alone = [oracle(lm, prefix, 24, eos) for prefix in prefixes]
    assert list(zip(ids, cut, strict=True)) == alone
    # The case is worth its name: several rows end, not together, and some never do.
    ends = {len(row) for row, was_cut in alone if not was_cut}
    assert len(ends) >= 2 and any(was_cut for _, was_cut in alone)


def test_greedy_keeps_each_rows_own_limit(lm: RWKV6, prefixes: list[list[int]], endless: list[list[int]]):
    limits = [3, 24, 0, 1, 7, 7, 2, 12]
    ids, cut = greedy(lm, *read(lm, prefixes), limits, NEVER)
    assert ids == [row[:limit] for row, limit in zip(endless, limits, strict=True)]
    assert cut == [True] * len(limits)


def test_greedy_that_ends_exactly_at_the_limit_is_not_cut(
    lm: RWKV6, prefixes: list[list[int]], endless: list[list[int]], eos: int
):
    row, length = next((i, ids.index(eos)) for i, ids in enumerate(endless) if eos in ids and ids[0] != eos)
    for limit, cut in ((length, False), (length - 1, True)):
        found = greedy(lm, *read(lm, [prefixes[row]]), [limit], eos)
        assert found == ([endless[row][:limit]], [cut])


def test_greedy_of_a_row_that_ends_at_once_is_empty(lm: RWKV6, prefixes: list[list[int]], endless: list[list[int]]):
    first = endless[2][0]
    ids, cut = greedy(lm, *read(lm, prefixes), [5] * len(prefixes), first)
    assert ids[2] == [] and cut[2] is False
    assert list(zip(ids, cut, strict=True)) == [oracle(lm, prefix, 5, first) for prefix in prefixes]


def test_greedy_of_no_row_is_nothing(lm: RWKV6):
    assert greedy(lm, torch.zeros(0, lm.sizes.vocab), lm.zero_state(0), [], 0) == ([], [])
