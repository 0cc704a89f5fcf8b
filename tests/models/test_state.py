import torch

from rwkv_speech.models.state import Packing, State


def test_packing_knows_the_sequences_that_are_not_empty():
    packing = Packing.of(torch.tensor([0, 0, 3, 3, 4]))
    assert packing.filled.tolist() == [1, 3]
    assert (packing.starts.tolist(), packing.ends.tolist()) == ([0, 3], [2, 3])


def test_select_takes_sequences_in_the_order_of_the_rows():
    state = State(
        torch.arange(6.0).view(1, 6, 1, 1, 1), torch.arange(6.0).view(1, 6, 1), -torch.arange(6.0).view(1, 6, 1)
    )
    chosen = state.select(torch.tensor([4, 0, 4]))
    assert [x.flatten().tolist() for x in chosen] == [[4, 0, 4], [4, 0, 4], [-4, 0, -4]]
