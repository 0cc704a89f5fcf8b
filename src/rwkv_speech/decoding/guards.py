"""When a decoded text has failed: whisper's rules, names and defaults, and whether anybody speaks at all."""

# F frames · K labels of the CTC head, the first being blank

import zlib
from typing import Protocol

import torch
from torch import Tensor

from rwkv_speech.decoding.options import Options
from rwkv_speech.models.ctc import BLANK, CtcSpec

# Measured: of the characters of speech of unknown voices the head finds two thirds at least.
_LEAST_HEARD = 0.25
# Measured: babble of eight voices has 1.7 frames in its fullest second at most, speech of known voices 12 at least.
_FRAMES_HEARD = 4.0


class Scored(Protocol):
    """A decoded text with the mean log-probability of its tokens and its end."""

    @property
    def avg_logprob(self) -> float: ...


def compression_ratio(text: str) -> float:
    """Bytes of the text per byte of it compressed: above 2.4 it repeats itself (openai/whisper, utils.py)."""
    content = text.encode("utf-8", "backslashreplace")
    return len(content) / len(zlib.compress(content))


def needs_fallback(hypothesis: Scored, text: str, no_speech_prob: float, options: Options) -> bool:
    """Whether to decode again at the next temperature (openai/whisper c0d2f62, `decode_with_fallback`).

    So if the text repeats itself or is unlikely; not if it is unlikely because nobody speaks.
    """
    unlikely = hypothesis.avg_logprob < options.logprob_threshold
    if unlikely and no_speech_prob > options.no_speech_threshold:
        return False
    return unlikely or compression_ratio(text) > options.compression_ratio_threshold


def is_silence(no_speech_prob: float, options: Options) -> bool:
    """Whether the text is to be dropped, as nobody speaks.

    whisper keeps a text that is likely (openai/whisper c0d2f62), as its probability of no speech comes from the same
    model. Here the CTC head is a witness of its own, and a language model is sure of what it makes up, too.
    """
    return no_speech_prob > options.no_speech_threshold


def is_unheard(text: str, ctc: Tensor, spec: CtcSpec, options: Options) -> bool:
    """Whether the text is to be dropped, as the language model made it up: of four of its characters the CTC head hears
    not one. A `no_speech_threshold` of 1 keeps it.
    """
    labels = torch.unique_consecutive(ctc.argmax(1))
    known = sum(label != spec.star for label in spec.encode(text.strip()))
    return options.no_speech_threshold < 1 and int((labels != BLANK).sum()) < _LEAST_HEARD * known


def no_speech_prob(ctc: Tensor | None, frame_rate: float) -> float:
    """How sure the CTC head is, 0 to 1, that nobody speaks in a piece of audio; 0 without a head.

    `ctc` (F, K) holds its log-probabilities, `frame_rate` of them a second. It is exp(-n / 4), n being the frames that
    hold a label, as expected, of the second that holds the most: above 0.6 for less than two. One word among silence is
    speech; doubts that are spread over a long silence are not.
    """
    if ctc is None:
        return 0.0
    heard = (1 - ctc[:, 0].double().exp()).clamp(min=0)
    second = round(frame_rate)
    sums = heard.new_zeros(len(heard) + second)  # of all frames before each, the first second's being none
    sums[second:] = heard.cumsum(0)
    in_a_second = sums[second:] - sums[: len(heard)]
    return float((-in_a_second.max() / _FRAMES_HEARD).exp()) if len(heard) else 1.0
