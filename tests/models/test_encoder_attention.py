"""The fused attention against transformers' own, eager one."""

import copy
from typing import Any

import pytest
import torch
from assertions import rms_error
from torch import Tensor
from transformers import WavLMConfig, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from rwkv_speech.errors import UserError
from rwkv_speech.models.encoder_attention import fuse_attention, relative_buckets

# transformers' own attention has a float bias beside a boolean mask.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

# Beyond the fused kernel's blocks of 512 keys, odd, one frame only.
LENGTHS = [[601, 40, 1], [7, 7], [33, 25, 32], [1], [2, 1]]


def make_encoder(stable: bool, scale: float = 0.2) -> Any:
    """A transformers WavLM encoder of three layers: every weight random, gates, biases and what is attended large."""
    config = WavLMConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        num_buckets=32,
        max_bucket_distance=64,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=stable,
    )
    torch.manual_seed(0)
    encoder = WavLMModel(config).encoder.requires_grad_(False).eval()
    for name, x in encoder.named_parameters():
        if "rel_pos" in name or "rel_attn" in name:
            x.copy_(torch.randn_like(x))
        else:
            strength = max(scale, 0.08) if "v_proj" in name or "out_proj" in name else scale
            x.copy_(strength * torch.randn_like(x) + (1.0 if "norm.weight" in name else 0.0))
    return encoder


def inputs(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Frames, and which of them are true."""
    torch.manual_seed(1)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), max(lengths), 64), mask


def run(encoder: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The true frames; the encoder clears padded ones in what it is given."""
    frames: Tensor = encoder(hidden.clone(), attention_mask=mask).last_hidden_state
    return frames[mask] if mask is not None else frames


def fused(encoder: Any) -> Any:
    ours = copy.deepcopy(encoder)
    fuse_attention(ours)
    return ours


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("stable", [True, False], ids=["stable", "post"])
def test_fuse_attention_equals_transformers_own(stable: bool, lengths: list[int]):
    encoder = make_encoder(stable)
    hidden, mask = inputs(lengths)
    got, want = run(fused(encoder), hidden, mask), run(encoder, hidden, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert rms_error(got, want) < 1e-5


@pytest.mark.parametrize("stable", [True, False], ids=["stable", "post"])
def test_fuse_attention_equals_transformers_own_without_a_mask(stable: bool):
    encoder = make_encoder(stable)
    hidden, _ = inputs([50, 50])
    torch.testing.assert_close(run(fused(encoder), hidden, None), run(encoder, hidden, None), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stable", [True, False], ids=["stable", "post"])
def test_fuse_attention_in_bfloat16_is_as_exact_as_transformers_own(stable: bool):
    encoder = make_encoder(stable, scale=0.05)
    hidden, mask = inputs([301, 40, 1])
    exact = run(encoder, hidden, mask)
    theirs, ours = encoder.bfloat16(), fused(encoder).bfloat16()
    got, want = (run(each, hidden.bfloat16(), mask).float() for each in (ours, theirs))
    assert rms_error(got, want) < 5e-3
    assert rms_error(got, exact) < 1.1 * rms_error(want, exact)


@pytest.mark.parametrize("part", ["gru_rel_pos_const", "gru_rel_pos_linear.weight", "rel_attn_embed.weight"])
@pytest.mark.parametrize("scale", [0.2, 0.05])
def test_each_part_of_the_bias_would_show(part: str, scale: float):
    """The control of the tests above: without it the frames are far from what they were."""
    encoder = make_encoder(True, scale)
    hidden, mask = inputs([301, 40])
    want = run(encoder, hidden, mask)
    for name, x in encoder.named_parameters():
        if name.endswith(part):
            x.zero_()
    assert rms_error(run(encoder, hidden, mask), want) > 1.5e-2


def test_frames_do_not_depend_on_the_batch():
    encoder = fused(make_encoder(True))
    hidden, mask = inputs([601, 40, 1])
    hidden[~mask] = torch.nan
    frames = encoder(hidden.clone(), attention_mask=mask).last_hidden_state
    for row, length in enumerate([601, 40, 1]):
        alone = run(encoder, hidden[row : row + 1, :length], None)
        torch.testing.assert_close(frames[row, :length], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 7, 64, 65, 301])
def test_position_bias_equals_transformers_own(num_frames: int):
    theirs = make_encoder(True)
    [first, *_] = fused(theirs).layers
    want = theirs.layers[0].attention.compute_bias(num_frames, num_frames)
    assert torch.equal(first.attention.position_bias(num_frames), want)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (64, 200), (32, 64), (5, 9)])
def test_relative_buckets_equal_transformers_own(num_buckets: int, max_distance: int):
    distances = torch.arange(-2_000, 2_001)
    theirs = WavLMAttention(8, 1, num_buckets=num_buckets, max_distance=max_distance)
    got = relative_buckets(distances, num_buckets, max_distance)
    assert torch.equal(got, theirs._relative_positions_bucket(distances))


def test_position_bias_is_computed_once_a_forward():
    encoder = fused(make_encoder(True))
    looked_up: list[int] = []
    encoder.layers[0].attention.rel_attn_embed.register_forward_hook(lambda _, __, out: looked_up.append(len(out)))
    hidden, mask = inputs([33, 25, 32])
    run(encoder, hidden, mask)
    assert looked_up == [2 * 33 - 1]


def test_fuse_attention_leaves_names_and_tensors():
    encoder = make_encoder(True)
    before = dict(encoder.named_parameters())
    fuse_attention(encoder)
    after = dict(encoder.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is x for name, x in before.items())


def test_fuse_attention_twice_changes_nothing():
    encoder = fused(make_encoder(True))
    hidden, mask = inputs([33, 25])
    assert torch.equal(run(fused(encoder), hidden, mask), run(encoder, hidden, mask))


def test_fuse_attention_names_what_a_later_transformers_lacks():
    encoder = make_encoder(True)
    del encoder.layers[1].attention.gru_rel_pos_const
    with pytest.raises(UserError, match=r"transformers [\d.]+.*gru_rel_pos_const.*5\.17 to 5\.23: install"):
        fuse_attention(encoder)


def test_fuse_attention_names_what_a_later_transformers_has_more():
    encoder = make_encoder(True)
    encoder.layers[0].attention.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="weights differ in scale"):
        fuse_attention(encoder)
