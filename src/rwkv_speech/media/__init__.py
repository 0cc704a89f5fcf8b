"""From an audio file of any kind to its samples, at its own rate and channels."""

from rwkv_speech.media.decoding import check_duration, check_size, claimed, decode, measure
from rwkv_speech.media.ffmpeg import Block
from rwkv_speech.media.opening import FAILURES, opened

__all__ = ["FAILURES", "Block", "check_duration", "check_size", "claimed", "decode", "measure", "opened"]
