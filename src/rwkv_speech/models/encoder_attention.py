"""WavLM's attention, fused: the gated relative position bias goes into the one kernel as an additive mask."""

# B batch · F frames · D encoder width = H·N · H heads · N head size

import math
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_speech.errors import UserError

# PyTorch's fused kernel for CUDA copies a mask whose rows do not begin at multiples of this.
_ROW_ALIGNMENT = 8


def fuse_attention(encoder: nn.Module) -> None:
    """Give every layer of a transformers WavLM encoder the fused attention, in place, on the weights it has.

    The names and tensors of the state dict stay as they are. Raises UserError where the installed transformers
    has another attention than the one that is replaced here.
    """
    layers: Any = encoder.layers
    for layer in layers:
        try:
            fused = GatedBiasAttention(layer.attention)
            if differing := sorted(fused.state_dict().keys() ^ layer.attention.state_dict().keys()):
                raise AttributeError(f"its weights differ in {', '.join(differing)}")
        except AttributeError as error:
            import transformers

            raise UserError(
                f"transformers {transformers.__version__}: its WavLM attention is not the one known here ({error}); "
                "expected that of 5.17 to 5.23: install one of these"
            ) from error
        layer.attention = fused


class GatedBiasAttention(nn.Module):
    """WavLM's self-attention in evaluation mode, on the modules of `theirs`, a transformers `WavLMAttention`.

    Raises AttributeError for one that lacks a part.

    score[i, j] = q[i]·k[j] / sqrt(N) + gate[i] bias[j - i], with the gate computed from the layer's input and the
    bias looked up by the bucket of the distance j - i (WavLM, arXiv 2110.13900, section 3.1).
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.num_heads: int = theirs.num_heads
        self.num_buckets: int = theirs.num_buckets
        self.max_distance: int = theirs.max_distance
        self.q_proj, self.k_proj, self.v_proj = theirs.q_proj, theirs.k_proj, theirs.v_proj
        self.out_proj = theirs.out_proj
        self.gru_rel_pos_linear, self.gru_rel_pos_const = theirs.gru_rel_pos_linear, theirs.gru_rel_pos_const
        # The first layer alone has the bias; the encoder hands what it returns to the others.
        if hasattr(theirs, "rel_attn_embed"):
            self.rel_attn_embed = theirs.rel_attn_embed

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None, Tensor]:
        """(B, F, D), true frames (B, F), bias (H, F, F) -> (B, F, D), no weights, the bias for the next layer.

        The frames past an utterance's end get values that mean nothing. Raises AttributeError where a layer
        without a bias of its own is given none.
        """
        # Beside bfloat16 weights the sums between layers are float32: one conversion serves all four projections.
        hidden_states = hidden_states.to(self.gru_rel_pos_linear.weight.dtype)
        B, F, D = hidden_states.shape
        if position_bias is None:
            position_bias = self.position_bias(F)
        heads = hidden_states.view(B, F, self.num_heads, -1).transpose(1, 2)
        padding = hidden_states.new_zeros(())
        if attention_mask is not None:
            padding = hidden_states.new_zeros(B, 1, 1, F).masked_fill_(~attention_mask.bool()[:, None, None], -math.inf)
        aligned = -(-F // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        mask = hidden_states.new_empty(B, self.num_heads, F, aligned)[..., :F]
        # Gate, bias and padding in one pass: the only (B, H, F, F) there is.
        torch.addcmul(padding, self.gate(heads), position_bias, out=mask)
        q, k, v = (
            project(hidden_states).view(B, F, self.num_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).reshape(B, F, D)), None, position_bias

    def gate(self, heads: Tensor) -> Tensor:
        """The layer's input by heads (B, H, F, N) -> what the bias is multiplied by, (B, H, F, 1)."""
        a, b = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        return a * (b * self.gru_rel_pos_const - 1) + 2

    def position_bias(self, num_frames: int) -> Tensor:
        """The bias of each query and key, (H, F, F): the same along every diagonal."""
        distances = torch.arange(1 - num_frames, num_frames, device=self.rel_attn_embed.weight.device)
        buckets = relative_buckets(distances, self.num_buckets, self.max_distance)
        # Query i has the F distances from -i on: a window that moves back by one from query to query.
        return self.rel_attn_embed(buckets).T.unfold(1, num_frames, 1).flip(1)


def relative_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Key minus query -> bucket, both integers of one shape.

    Each side has half the buckets: half of them for single distances, the rest ever wider up to `max_distance`
    (T5, arXiv 1910.10683, section 2.1).
    """
    side = num_buckets // 2
    single = side // 2
    far = distances.abs()
    # The order of these float operations decides where a bucket ends: it is transformers' own.
    growth = torch.log(far.clamp_min(single).float() / single) / math.log(max_distance / single)
    wide = (single + growth * (side - single)).long().clamp_max(side - 1)
    return torch.where(far < single, far, wide) + side * (distances > 0)
