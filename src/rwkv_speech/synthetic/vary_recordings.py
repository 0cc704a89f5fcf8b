"""`python -m rwkv_speech.synthetic.vary_recordings --data MANIFESTS --out FOLDER`: recordings as others would sound.

A few voices in one studio teach little about other people. Each recording is written again at another speed, which
moves its pitch and vocal tract, with noise, through another microphone, some in a room and some over a telephone.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torchaudio import functional as F

from rwkv_speech.audio import SAMPLE_RATE, AudioError, load_audio
from rwkv_speech.data.manifest import read_lines
from rwkv_speech.errors import UserError, exit_code
from rwkv_speech.files import write_text_atomically
from rwkv_speech.flags import OutFlags, flag, parse
from rwkv_speech.synthetic.rooms import augment

_SPEEDS, _PEAKS, _STRENGTHS = (0.85, 1.18), (0.2, 0.8), (0.1, 0.8)
_SHOWN = 5


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.vary_recordings"""

    data: str = flag("", "manifests of JSON lines, separated by commas")
    copies: int = flag(2, "copies of each recording", at_least=1)
    seed: int = flag(7, "seed of what is done to each", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        """Raises UserError without recordings and a folder for their copies."""
        super().check()
        if not self.data.strip(" ,"):
            raise UserError("--data: found nothing, expected manifests of JSON lines, separated by commas")


def vary_recordings(config: Flags) -> None:
    """Write train.jsonl, whose lines say what those of `data` say, and its audio beside it.

    Conversations, text and what cannot be read are left out and counted. Raises UserError for a bad manifest, and where
    nothing is left.
    """
    manifests = [Path(name) for name in filter(None, map(str.strip, config.data.split(",")))]
    found = [(manifest, row) for manifest in manifests for row in read_lines(manifest)]
    spoken = [(number, *pair) for number, pair in enumerate(found) if pair[1].get("audio_filepath")]
    out, lines, unread = Path(config.out), list[str](), list[str]()
    (out / "audio").mkdir(parents=True, exist_ok=True)
    for number, manifest, row in spoken:
        try:
            path = manifest.parent / row["audio_filepath"]
            waveform = load_audio(path, float(row.get("offset") or 0), row.get("duration"))
        except AudioError as error:
            unread.append(str(error))
            continue
        for copy in range(config.copies):
            varied = vary(waveform, random.Random(f"{config.seed}/{number}/{copy}"))
            file = f"audio/{number:06d}-{copy}.flac"
            soundfile.write(out / file, varied.numpy(), SAMPLE_RATE)
            kept = {key: value for key, value in row.items() if key not in ("offset", "id")}
            of_copy = {"audio_filepath": file, "duration": round(len(varied) / SAMPLE_RATE, 4)}
            lines.append(json.dumps({**kept, **of_copy}, ensure_ascii=False))
    if not lines:
        raise UserError(f"--data: {config.data} holds no recording that can be read; expected one at least")
    write_text_atomically(out / "train.jsonl", "".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} copies of {len(spoken) - len(unread)} recordings in {out}")
    if len(found) > len(spoken):
        print(f"{len(found) - len(spoken)} lines are conversations or have no audio: they are left out")
    if unread:
        print(f"{len(unread)} recordings cannot be read, they are left out:", *unread[:_SHOWN], sep="\n  ")


def vary(waveform: Tensor, rng: random.Random) -> Tensor:
    """(S,) at 16 kHz -> (S',): another speed, level, microphone and noise, at times a room or a telephone's band."""
    rate = round(SAMPLE_RATE * rng.uniform(*_SPEEDS) / 100) * 100  # coarse: resampling is quick for such ratios
    waveform = F.resample(waveform, rate, SAMPLE_RATE)
    waveform = waveform * (rng.uniform(*_PEAKS) / waveform.abs().max().clamp_min(1e-3))
    noise = torch.Generator().manual_seed(rng.randrange(2**40))
    (waveform,) = augment(waveform[None], noise, rng.uniform(*_STRENGTHS))
    return waveform * (0.95 / waveform.abs().max().clamp_min(0.95))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: vary_recordings(parse(Flags, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
