"""What the page shows of a transcript: its words on the waveform, their times as a table, and files to download."""

# S samples

import base64
from collections.abc import Iterable, Iterator
from html import escape

import numpy as np
from torch import Tensor

from rwkv_speech.decoding.results import Segment, Transcript, Word
from rwkv_speech.decoding.writers import clock, one_line, render

_PEAKS_A_SECOND = 50
_WIDTH, _HEIGHT = 120, 60  # pixels of a second, and of the loudest sample to either side
_MOST_SECONDS = 300  # of a picture; a browser draws more too slowly
_FILES = {"txt": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt", "json": "application/json"}


class Outline:
    """The loudest sample of each 20 ms of a recording, as it comes."""

    def __init__(self, rate: int) -> None:
        self._size, self._rest = rate // _PEAKS_A_SECOND, np.zeros(0, np.float32)
        self._peaks = list[np.ndarray]()

    def push(self, samples: np.ndarray) -> None:
        """Take the next (S,), floating-point numbers between -1 and 1, or int16."""
        scale = 2**15 if samples.dtype == np.int16 else 1
        samples = np.concatenate([self._rest, np.abs(samples.astype(np.float32)) / scale])
        whole = len(samples) // self._size * self._size
        self._peaks.append(samples[:whole].reshape(-1, self._size).max(1))
        self._rest = samples[whole:]

    def watched(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The blocks (S,) of a recording as they are read."""
        for block in blocks:
            self.push(block.numpy())
            yield block

    @property
    def peaks(self) -> np.ndarray:
        """From 0 to 1, in order."""
        return np.concatenate([np.zeros(0, np.float32), *self._peaks])


def spoken(text: str, partial: str = "") -> str:
    """Text that stays, and what may change behind it."""
    return f"<p class='spoken'>{escape(text.lstrip())}<span class='partial'>{escape(partial)}</span></p>"


def picture(transcript: Transcript, outline: Outline) -> str:
    """Each word on the waveform where it is said, or each segment where no word has times; and a table of them."""
    timed = transcript.words or transcript.segments
    seconds = min(transcript.seconds, _MOST_SECONDS)
    drawn = [x for x in timed if x.start < seconds]
    peaks = outline.peaks[: int(seconds * _PEAKS_A_SECOND)]
    step, high = _WIDTH / _PEAKS_A_SECOND, max(1e-3, float(peaks.max(initial=0)))
    bars = "".join(f"M{i * step:.1f} {_HEIGHT - y:.1f}V{_HEIGHT + y:.1f}" for i, y in enumerate(peaks / high * _HEIGHT))
    words = "".join(_word(x, number) for number, x in enumerate(drawn))
    kind = "words" if transcript.words else "segments"
    label = f"Waveform of {transcript.seconds:.1f} s with {len(drawn)} {kind}; the table below holds their times"
    rows = "".join(
        f"<tr><td>{clock(x.start)}</td><td>{clock(x.end)}</td><td>{escape(_text(x))}</td></tr>" for x in timed
    )
    note = f"<p>The first {_MOST_SECONDS} s are drawn.</p>" if transcript.seconds > seconds else ""
    return (
        f"<div class='wave' tabindex='0' role='group' aria-label='Waveform, scrolls sideways'><svg role='img' "
        f"aria-label='{label}' width='{max(1, round(seconds * _WIDTH))}' height='{2 * _HEIGHT + 44}'>"
        f"<path d='{bars}'/>{words}</svg></div>{note}<details><summary>Times of {kind}</summary>"
        f"<table><tr><th>start</th><th>end</th><th>text</th></tr>{rows}</table></details>"
    )


def downloads(transcript: Transcript) -> str:
    """Links that hold the files themselves, so that none is left with the server."""
    return "<p class='files'>Download: " + " ".join(
        link(f"transcript.{form}", render(transcript, form).encode("utf-8", "replace"), kind)
        for form, kind in _FILES.items()
    ) + "</p>"  # fmt: skip


def aloud(wav: bytes) -> str:
    """What plays a spoken answer at once, and says that no person speaks."""
    source = f"data:audio/wav;base64,{base64.b64encode(wav).decode()}"
    player = f"<audio controls autoplay src='{source}'></audio>"
    return f"<figure><figcaption>Synthetic voice (eSpeak NG)</figcaption>{player}</figure>"


def link(name: str, content: bytes, kind: str = "application/octet-stream") -> str:
    """A link that downloads this content."""
    data = base64.b64encode(content).decode()
    return f"<a download='{name}' href='data:{kind};base64,{data}'>{name}</a>"


def _word(x: Word | Segment, number: int) -> str:
    """Every other word stands lower, so that short ones do not lie on each other."""
    at, y = x.start * _WIDTH, 2 * _HEIGHT + 16 + 18 * (number % 2)
    times = f"{clock(x.start)} to {clock(x.end)}"
    line = f"<line x1='{at:.0f}' x2='{at:.0f}' y2='{y}'/>"
    return f"{line}<text x='{at + 2:.0f}' y='{y}'>{escape(_text(x))}<title>{times}</title></text>"


def _text(x: Word | Segment) -> str:
    return one_line(x.word if isinstance(x, Word) else x.text)
