"""Synthetic speech with times of its phonemes and words, from eSpeak NG, the library in the `espeakng-loader` wheel.

Only the tiny default and the tests use it; nothing in training or decoding of real models imports it.
"""

import ctypes
import io
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
import soundfile
import torch
import torchaudio.functional as F

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.errors import UserError

# Values of eSpeak NG's public header, speak_lib.h.
# Synchronous: in the asynchronous modes eSpeak hands over between threads and now and then waits for ever.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS, _PHONEME_IPA = 1, 2
_CHARS_UTF8, _SSML = 1, 0x10
_EVENT_LIST_TERMINATED, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7
_RATE, _PITCH, _RANGE = 1, 3, 4
_SEED = 1


class _Event(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "identifier", "text_position", "length", "milliseconds", "sample")),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Voice:
    """A speaker: an eSpeak voice such as "en-us+f3", words per minute, pitch and pitch range (0 to 99)."""

    name: str = "en-us"
    rate: int = 175
    pitch: int = 50
    pitch_range: int = 50


@dataclass(frozen=True)
class Speech:
    """`samples` (S,) float32 at `sample_rate` Hz, and what begins where, in order of time.

    `phonemes` holds (IPA name, first sample), `words` the first sample of each word.
    """

    samples: np.ndarray
    sample_rate: int
    phonemes: list[tuple[str, int]]
    words: list[int]

    def waveform(self, rate: int = SAMPLE_RATE) -> torch.Tensor:
        """(S,) float32 at `rate` Hz, by default the package's."""
        return F.resample(torch.from_numpy(self.samples), self.sample_rate, rate)

    def wav(self) -> bytes:
        """The bytes of a WAV file, 16-bit."""
        file = io.BytesIO()
        soundfile.write(file, self.samples, self.sample_rate, "PCM_16", format="WAV")
        return file.getvalue()


class Synthesizer:
    """Speaks text; eSpeak keeps its state in globals, so a process speaks one text at a time.

    Raises UserError if `espeakng-loader` is missing or a voice does not exist.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise UserError(
                "synthetic speech needs the package espeakng-loader, which is not installed; "
                "install it with: pip install espeakng-loader"
            ) from error
        data = espeakng_loader.get_data_path()
        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate: int = self._lib.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), _PHONEME_EVENTS | _PHONEME_IPA
        )
        if self.sample_rate <= 0:
            raise UserError(f"eSpeak NG did not start with its data in {data}")
        self._chunks: list[np.ndarray] = []
        self._phonemes: list[tuple[str, int]] = []
        self._words: list[int] = []
        self._callback = _Callback(self._receive)

    def _receive(self, wav: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]") -> int:
        if wav and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wav, (count,)).astype(np.float32) / 32768.0)
        i = 0
        while events[i].type != _EVENT_LIST_TERMINATED:
            if events[i].type == _EVENT_PHONEME:
                self._phonemes.append((events[i].name.decode("utf-8", "ignore"), events[i].sample))
            elif events[i].type == _EVENT_WORD:
                self._words.append(events[i].sample)
            i += 1
        return 0

    def say(self, text: str, voice: Voice, pauses: Sequence[int] = ()) -> Speech:
        """Speak `text`, with `pauses` (ms) between its words; raises UserError for an unknown voice."""
        if self._lib.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice {voice.name!r}; examples: en-us, en-gb+f3, de, cmn")
        for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        # It would draw the noise of some voices by the clock: a corpus made again must be the same.
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        self._chunks, self._phonemes, self._words = [], [], []
        self._lib.espeak_SetSynthCallback(self._callback)  # another instance may have set its own
        if pauses:
            first, *rest = map(escape, text.split())
            words = (f"<break time='{pause}ms'/>{word}" for pause, word in zip(pauses, rest, strict=True))
            text = f"<speak>{' '.join([first, *words])}</speak>"
        data = text.encode()
        self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, _CHARS_UTF8 | (_SSML if pauses else 0), None, None)
        samples = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.float32)
        return Speech(samples, self.sample_rate, self._phonemes, self._words)
