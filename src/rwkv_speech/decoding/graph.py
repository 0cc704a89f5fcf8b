"""The step of a slot table as a CUDA graph: on a GPU its many small kernels cost more to launch than to run."""

# S slots · V vocabulary

import torch
from torch import Tensor

from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.state import State

_WARM_UPS = 3


class StepGraph:
    """`lm.step` on one table of states, recorded once; what the table holds at that time is lost."""

    def __init__(self, lm: RWKV, state: State) -> None:
        self._tokens = torch.zeros(state.wkv.shape[1], dtype=torch.int64, device=state.wkv.device)
        stream = torch.cuda.Stream(state.wkv.device)
        stream.wait_stream(torch.cuda.current_stream(state.wkv.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                lm.step(self._tokens, state)
        torch.cuda.current_stream(state.wkv.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = lm.step(self._tokens, state)

    @classmethod
    def of(cls, lm: RWKV, state: State) -> "StepGraph | None":
        """None on a CPU, and under autocast, which keeps copies of the weights outside of the graph."""
        device = state.wkv.device.type
        return cls(lm, state) if device == "cuda" and not torch.is_autocast_enabled(device) else None

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens (S,) of all slots, on the host -> logits (S, V), which the next call overwrites."""
        self._tokens.copy_(tokens, non_blocking=True)
        self._graph.replay()
        return self._logits
