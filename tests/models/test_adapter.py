import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_speech.models.adapter import Adapter


def naive(adapter: Adapter, frames: Tensor) -> Tensor:
    """One utterance's frames (F, D) -> its audio tokens (A, C), one token after another."""
    parameters = dict(adapter.named_parameters())
    tokens = []
    for start in range(0, len(frames) - adapter.stack + 1, adapter.stack):
        stacked = torch.cat([frames[start + i] for i in range(adapter.stack)])
        hidden = F.linear(stacked, parameters["0.weight"], parameters["0.bias"]).clamp_min(0)
        tokens.append(F.linear(hidden, parameters["2.weight"], parameters["2.bias"]))
    return torch.stack(tokens) if tokens else frames.new_zeros(0, len(parameters["2.bias"]))


def ragged(lengths: list[int], width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Frames whose padding is NaN: whatever touches it shows."""
    frames = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        frames[row, length:] = float("nan")
    return frames, torch.tensor(lengths)


@pytest.mark.parametrize("stack", [1, 3, 5])
def test_adapter_equals_a_loop_over_utterances(stack: int):
    lengths = [7, 15, 4, 0, 2, 10]
    torch.manual_seed(1)
    adapter = Adapter(D=6, C=8, stack=stack, hidden=16)
    frames, frame_lengths = ragged(lengths, 6)
    tokens, token_lengths = adapter(frames, frame_lengths)
    assert token_lengths.tolist() == [length // stack for length in lengths]
    expected = torch.cat([naive(adapter, frames[row, :length]) for row, length in enumerate(lengths)])
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


def test_adapter_drops_the_remaining_frames():
    adapter = Adapter(D=2, C=3, stack=3, hidden=4)
    frames, _ = ragged([6], 2)
    whole, _ = adapter(frames, torch.tensor([6]))
    more, lengths = adapter(torch.cat((frames, torch.full((1, 2, 2), float("nan"))), 1), torch.tensor([8]))
    assert lengths.tolist() == [2] and torch.equal(more, whole)


def test_adapter_of_fewer_frames_than_a_stack_gives_nothing():
    adapter = Adapter(D=2, C=3, stack=5, hidden=4)
    tokens, lengths = adapter(torch.ones(2, 4, 2), torch.tensor([4, 0]))
    assert tokens.shape == (0, 3) and lengths.tolist() == [0, 0]


def test_adapter_result_does_not_depend_on_the_batch():
    torch.manual_seed(2)
    adapter = Adapter(D=6, C=8, stack=5, hidden=16)
    frames, lengths = ragged([11, 25], 6)
    together, counts = adapter(frames, lengths)
    for row, part in enumerate(together.split(counts.tolist())):
        alone, _ = adapter(frames[row : row + 1, : lengths[row]], lengths[row : row + 1])
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-6)


def test_adapter_padding_sends_no_gradient():
    adapter = Adapter(D=2, C=3, stack=2, hidden=4)
    frames = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(3)).requires_grad_()
    tokens, _ = adapter(frames, torch.tensor([6, 3]))
    tokens.sum().backward()
    assert frames.grad is not None
    touched = frames.grad.abs().sum(-1) > 0
    assert not touched[1, 2:].any() and touched[0].any() and touched[1, :2].any()


def test_adapter_parameters_have_the_published_names_and_shapes():
    adapter = Adapter(D=1024, C=8)
    assert {name: tuple(x.shape) for name, x in adapter.named_parameters()} == {
        "0.weight": (2048, 5120),
        "0.bias": (2048,),
        "2.weight": (8, 2048),
        "2.bias": (8,),
    }
    assert list(adapter.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
