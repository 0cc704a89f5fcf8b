"""Where somebody speaks: silero-vad's model for 16 kHz gives each window of 512 samples (32 ms) a probability.

The package takes one window at a time; here its weights run over blocks of windows, five times as fast. A block is
always of one size, so that any chunking of a recording gives the same bits.
"""

# W windows · S samples · T steps of the filter bank (4 a window) · C channels

import importlib.util
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

WINDOW = 512  # samples
BLOCK_WINDOWS = 8  # a quarter of a second, for which a stream waits
BLOCK = BLOCK_WINDOWS * WINDOW
# The model sees so many samples before a window, and as many mirrored behind it.
_CONTEXT = 64
_STRIDES = (1, 2, 2, 1)


class Vad:
    """The probabilities of speech of one recording, which comes in blocks; on the CPU.

    It begins as if after a second of silence: the model misses up to half a second of speech that it begins with.
    """

    def __init__(self) -> None:
        self._before = torch.zeros(_CONTEXT)
        self._state = _after_silence()

    @torch.no_grad()
    def block(self, samples: Tensor) -> Tensor:
        """The next BLOCK samples (S,), fewer at the recording's end only -> the probability of each window (W,)."""
        num_windows = -(-len(samples) // WINDOW)
        samples = torch.cat([self._before, samples, samples.new_zeros(BLOCK - len(samples))])
        self._before = samples[-_CONTEXT:].clone()
        probabilities, self._state = _step(samples.unfold(0, _CONTEXT + WINDOW, WINDOW), self._state)
        return probabilities[:num_windows]


def _step(windows: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(W, 576) and the LSTM's state -> (W,) and the state after them.

    Matrix products: for so few windows, they take half of the convolutions' time.
    """
    weights = _weights()
    bank = weights["stft.forward_basis_buffer"][:, 0]
    x = functional.pad(windows, (0, _CONTEXT), "reflect").unfold(1, bank.shape[1], bank.shape[1] // 2)
    real, imaginary = functional.linear(x, bank).chunk(2, dim=-1)
    x = (real.square() + imaginary.square()).sqrt()  # (W, T, C)
    for number, stride in enumerate(_STRIDES):
        weight, bias = (weights[f"encoder.{number}.reparam_conv.{name}"] for name in ("weight", "bias"))
        x = functional.pad(x, (0, 0, 1, 1)).unfold(1, 3, stride).flatten(2)
        x = functional.linear(x, weight.flatten(1), bias).relu()
    # The windows are the LSTM's time; they have one step left.
    lstm = [weights[f"decoder.rnn.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    x, *state = torch.lstm(x, state, lstm, True, 1, 0.0, False, False, False)
    weight, bias = (weights[f"decoder.decoder.2.{name}"] for name in ("weight", "bias"))
    return functional.linear(x[:, 0].relu(), weight[:, :, 0], bias)[:, 0].sigmoid(), state


@lru_cache(1)
def _after_silence() -> list[Tensor]:
    """The LSTM's state after a second of zeros."""
    size = _weights()["decoder.rnn.weight_hh"].shape[1]
    state = [torch.zeros(1, 1, size), torch.zeros(1, 1, size)]
    with torch.no_grad():
        for _ in range(4):
            _, state = _step(torch.zeros(BLOCK_WINDOWS, _CONTEXT + WINDOW), state)
    return state


@lru_cache(1)
def _weights() -> dict[str, Tensor]:
    """The weights of silero-vad's default model, by its names, from its wheel.

    The package itself is not imported: that would set torch to one thread.
    """
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'silero_vad': pip install silero-vad", name="silero_vad")
    with warnings.catch_warnings():
        # torch.jit.load is deprecated; but the wheel's safetensors hold other, older weights.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.load(Path(spec.submodule_search_locations[0]) / "data" / "silero_vad.jit", "cpu")
    return {name.removeprefix("_model."): x.detach() for name, x in model.state_dict().items()}
