from pathlib import Path

import pytest
import torch
from assertions import assert_rms_close
from tiny_models import RANDOM_TENSORS
from torch.nn import functional as F

from rwkv_speech.models.families import read_lm
from rwkv_speech.models.quantised import Int8Linear


def test_int8_linear_rounds_the_weights_and_nothing_else():
    torch.manual_seed(0)
    weight = torch.randn(600, 96) * torch.logspace(-3, 3, 600)[:, None]
    weight[5] = 0
    given = weight.clone()
    linear = Int8Linear(weight)
    assert torch.equal(weight, given)
    rounded = linear.weight * linear.scale[:, None]
    assert linear.weight.abs().amax(1).tolist() == [127 if row != 5 else 0 for row in range(600)]
    assert ((rounded - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253.9).all()
    for shape in ((96,), (1, 96), (2, 7, 96)):
        x = torch.randn(shape)
        assert_rms_close("float32", linear(x), F.linear(x.double(), rounded.double()), 1e-6)
        got = linear(x.bfloat16())
        assert got.dtype == torch.bfloat16 and got.shape == (*shape[:-1], 600)
        assert_rms_close("bfloat16", got, F.linear(x.bfloat16().double(), rounded.double()), 5e-3)


@pytest.mark.parametrize("family", RANDOM_TENSORS)
def test_int8_model_is_close_to_float32_and_small(family: str, tmp_path: Path):
    torch.save(RANDOM_TENSORS[family](C=256, ffn=896, vocab=300), tmp_path / "base.pth")
    wide, narrow = (read_lm(tmp_path / "base.pth", dtype) for dtype in (torch.float32, torch.int8))
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(4))
    want, got = wide(ids), narrow(ids)
    assert_rms_close("logits", got.logits, want.logits, 4e-2)
    assert_rms_close("state", got.state.wkv, want.state.wkv, 4e-2)
    sizes = [
        sum(x.nbytes for name, x in model.state_dict().items() if not name.startswith("emb"))
        for model in (wide, narrow)
    ]
    assert sizes[1] < 0.3 * sizes[0]
    assert {x.dtype for x in narrow.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", RANDOM_TENSORS)
def test_int8_model_reads_and_steps_alike(family: str, tmp_path: Path):
    torch.save(RANDOM_TENSORS[family](), tmp_path / "base.pth")
    model = read_lm(tmp_path / "base.pth", torch.int8)
    ids, state = torch.randint(272, (3, 12)), model.zero_state(3)
    whole = model(ids, state=state)
    steps = torch.stack([model.step(column, state) for column in ids.T], 1)
    assert_rms_close("logits", steps, whole.logits, 2e-2)
    assert steps.argmax(-1).eq(whole.logits.argmax(-1)).float().mean() == pytest.approx(1, abs=0.1)
