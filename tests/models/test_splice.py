import pytest
import torch
from torch import Tensor

from rwkv_speech.models.splice import IGNORE, Audio, Prompt, Spliced, Text, fill, splice

SEPARATOR, EOS, NO = 36, 0, IGNORE


def laid_out(audio_lengths: list[int], texts: list[list[int]]) -> Spliced:
    rows = zip(audio_lengths, texts, strict=True)
    return splice([[Audio(length), Prompt([SEPARATOR]), Text(text)] for length, text in rows], EOS)


def picture(spliced: Spliced) -> list[str]:
    """What goes in at each position: "a0", "a1" ... for audio tokens, the number for a token id."""
    row = ["?"] * len(spliced.labels)
    for i, position in enumerate(spliced.audio_positions.tolist()):
        assert row[position] == "?"
        row[position] = f"a{i}"
    for token, position in zip(spliced.token_ids.tolist(), spliced.token_positions.tolist(), strict=True):
        assert row[position] == "?"
        row[position] = str(token)
    return row


def naive(audio_lengths: list[int], texts: list[list[int]]) -> tuple[list[str], list[int], list[int]]:
    """Inputs, labels and bounds, written one position after another."""
    inputs, labels, ends, audio = [], [], [0], 0
    for length, text in zip(audio_lengths, texts, strict=True):
        for _ in range(length):
            inputs.append(f"a{audio}")
            labels.append(NO)
            audio += 1
        for token, target in zip([SEPARATOR, *text], [*text, EOS], strict=True):
            inputs.append(str(token))
            labels.append(target)
        ends.append(len(inputs))
    return inputs, labels, ends


def test_splice_one_utterance():
    spliced = laid_out([2], [[7, 8]])
    assert picture(spliced) == ["a0", "a1", "36", "7", "8"]
    assert spliced.labels.tolist() == [NO, NO, 7, 8, EOS]
    assert spliced.cu_seqlens.tolist() == [0, 5]


def test_splice_ragged_utterances():
    spliced = laid_out([2, 0, 3, 1], [[7], [8, 9, 8], [], [5]])
    # fmt: off
    assert picture(spliced) == [
        "a0", "a1", "36", "7",
        "36", "8", "9", "8",
        "a2", "a3", "a4", "36",
        "a5", "36", "5",
    ]
    assert spliced.labels.tolist() == [
        NO, NO, 7, EOS,
        8, 9, 8, EOS,
        NO, NO, NO, EOS,
        NO, 5, EOS,
    ]
    # fmt: on
    assert spliced.cu_seqlens.tolist() == [0, 4, 8, 12, 15]


def test_splice_of_neither_audio_nor_text_is_a_separator():
    spliced = laid_out([0, 0], [[], []])
    assert picture(spliced) == ["36", "36"] and spliced.labels.tolist() == [EOS, EOS]


def test_splice_of_no_utterance_is_empty():
    spliced = laid_out([], [])
    assert picture(spliced) == [] and spliced.cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_splice_equals_a_loop_over_positions(seed: int):
    draw = torch.Generator().manual_seed(seed)

    def ints(high: int, count: int) -> list[int]:
        return torch.randint(0, high, (count,), generator=draw).tolist()

    count = 1 + ints(6, 1)[0]
    audio_lengths = ints(5, count)
    texts = [[1 + i for i in ints(90, length)] for length in ints(5, count)]
    spliced = laid_out(audio_lengths, texts)
    inputs, labels, ends = naive(audio_lengths, texts)
    assert picture(spliced) == inputs
    assert spliced.labels.tolist() == labels
    assert spliced.cu_seqlens.tolist() == ends
    assert all(x.dtype == torch.int64 for x in spliced)


def test_splice_without_a_text_learns_nothing():
    spliced = splice([[Audio(length), Prompt([SEPARATOR])] for length in (2, 0, 1)], EOS)
    assert picture(spliced) == ["a0", "a1", "36", "36", "a2", "36"]
    assert spliced.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert spliced.labels.tolist() == [NO] * 6


def test_splice_of_turns():
    """A prompt before the audio and one of several tokens behind it; a second turn sees the first one's text."""
    turns = [Prompt([3, 4]), Audio(1), Prompt([36, 37]), Text([7, 8]), Audio(2), Prompt([36]), Text([9])]
    spliced = splice([turns, [Audio(1), Prompt([36]), Text([])]], EOS)
    assert picture(spliced) == ["3", "4", "a0", "36", "37", "7", "8", "a1", "a2", "36", "9", "a3", "36"]
    assert spliced.labels.tolist() == [NO, NO, NO, NO, 7, 8, EOS, NO, NO, 9, EOS, NO, EOS]
    assert spliced.cu_seqlens.tolist() == [0, 11, 13]


def test_splice_of_a_text_that_nothing_precedes_is_an_error():
    with pytest.raises(ValueError, match="at the start of a sequence"):
        splice([[Audio(1), Text([1])], [Text([1])]], EOS)


def numbered(count: int, first: float) -> Tensor:
    """Rows (count, 2) that all differ: [first, -first], [first + 1, -first - 1] ..."""
    column = torch.arange(count, dtype=torch.float32) + first
    return torch.stack((column, -column), 1)


def test_fill_puts_every_row_in_its_place():
    spliced = laid_out([1, 0, 2], [[7], [8], []])
    inputs = fill(spliced, numbered(3, 100), numbered(5, 200))
    assert inputs.shape == (1, 8, 2)
    assert inputs[0, :, 0].tolist() == [100, 200, 201, 202, 203, 101, 102, 204]
    assert torch.equal(inputs[0, :, 1], -inputs[0, :, 0])
    assert spliced.token_ids.tolist() == [36, 7, 36, 8, 36]


def test_fill_sends_each_gradient_to_its_own_row():
    spliced = laid_out([1, 0, 2], [[7], [8], []])
    audio, embeddings = numbered(3, 100).requires_grad_(), numbered(5, 200).requires_grad_()
    weights = numbered(8, 1)
    (fill(spliced, audio, embeddings)[0] * weights).sum().backward()
    assert audio.grad is not None and embeddings.grad is not None
    assert audio.grad[:, 0].tolist() == [1, 6, 7]
    assert embeddings.grad[:, 0].tolist() == [2, 3, 4, 5, 8]
    assert torch.equal(audio.grad[:, 1], -audio.grad[:, 0])


def test_fill_takes_the_type_of_the_embeddings():
    spliced = laid_out([1], [[7]])
    audio = numbered(1, 1).requires_grad_()
    inputs = fill(spliced, audio, numbered(2, 2).bfloat16())
    assert inputs.dtype == torch.bfloat16 and inputs[0, :, 0].tolist() == [1, 2, 3]
    inputs.sum().backward()
    assert audio.grad is not None and audio.grad.dtype == torch.float32 and audio.grad.tolist() == [[1, 1]]
