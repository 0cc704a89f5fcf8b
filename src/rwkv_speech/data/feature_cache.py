"""The frozen encoder's frames on disk, so that it encodes every recording once.

Frames are kept in safetensors files, each recording's by its name (`recording_key`), which changes with its file.
"""

# S samples · F frames · D encoder width

import copy
import hashlib
import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rwkv_speech.data.source import Utterance
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_atomically

logger = logging.getLogger(__name__)

SHARD_BYTES = 512 << 20
_REMEDY = "start again, and what is missing is computed again"


def recording_key(found: Utterance) -> str | None:
    """Name the recording of an utterance without decoding it, by its file, segment, size and time of change.

    None where the file is not there, and for a source that keeps the bytes itself and cannot name them.
    """
    identity = found.identity
    if found.audio is not None:
        try:
            status = os.stat(found.audio)
        except OSError:
            return None
        identity = json.dumps([found.audio, found.offset, found.duration, status.st_size, status.st_mtime_ns])
    return None if identity is None else hashlib.sha256(identity.encode()).hexdigest()[:32]


class Frames(NamedTuple):
    """What is kept of one recording: frames (F, D), and S, the number of its samples."""

    frames: Tensor
    num_samples: int


class _Place(NamedTuple):
    shard: Path
    num_samples: int
    checksum: int


class FeatureCache:
    """The frames of one encoder in a folder; `encoder_key` is whatever tells it from others.

    `dtype` is one of config.FEATURE_DTYPES: training in bf16 loses nothing by bfloat16, for the adapter's first layer
    rounds its input so anyway. Processes that write take different `writer` numbers; `refresh` shows them what the
    others wrote. A damaged shard is named in the log and removed.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder_key: str,
        dtype: str = "bfloat16",
        *,
        writer: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.folder = Path(folder) / f"{hashlib.sha256(encoder_key.encode()).hexdigest()[:16]}-{dtype}"
        self._writer, self._shard_bytes = writer, shard_bytes
        self._waiting: dict[str, Frames] = {}
        self.refresh()

    def for_writer(self, writer: int) -> "FeatureCache":
        """The same folder for the process that writes under this number."""
        changed = copy.copy(self)
        changed._writer, changed._waiting = writer, {}
        changed.refresh()
        return changed

    def refresh(self) -> None:
        """Read what is there now."""
        self._places: dict[str, _Place] = {}
        self._open: dict[Path, Any] = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._places.update(_read_places(shard))

    def __contains__(self, key: str | None) -> bool:
        return key in self._places or key in self._waiting

    def get(self, key: str | None) -> Frames | None:
        """Read the frames of a recording from the mapped file, or None if they are not here.

        Raises UserError naming a shard whose bytes are not those that were written, which is then removed.
        """
        place = self._places.get(key) if key else None
        if place is None or key is None:
            return None
        try:
            if place.shard not in self._open:
                self._open[place.shard] = safe_open(place.shard, "pt")
            frames: Tensor = self._open[place.shard].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{place.shard}: cannot be read any more ({error}); {_REMEDY}") from error
        if _checksum(frames) != place.checksum:
            place.shard.unlink(missing_ok=True)
            raise UserError(
                f"{place.shard}: is damaged, its bytes are not those that were written, and was removed; {_REMEDY}"
            )
        return Frames(frames, place.num_samples)

    def put(self, key: str, frames: Tensor, num_samples: int) -> None:
        """Keep frames (F, D); they are on disk once a shard is full or `flush` is called."""
        self._waiting[key] = Frames(frames.to("cpu", self.dtype, copy=True), num_samples)
        if sum(kept.frames.nbytes for kept in self._waiting.values()) >= self._shard_bytes:
            self.flush()

    def clear_unfinished(self) -> None:
        """Remove what a killed run of this writer left of a shard."""
        for temporary in self.folder.glob(f".{self._writer:04d}-*"):
            temporary.unlink(missing_ok=True)

    def flush(self) -> None:
        """Write what waits as one shard, whole or not at all."""
        if not self._waiting:
            return
        frames = {key: kept.frames for key, kept in self._waiting.items()}
        rows = {key: [kept.num_samples, _checksum(kept.frames)] for key, kept in self._waiting.items()}
        name = hashlib.sha256("".join(frames).encode()).hexdigest()[:16]
        shard = self.folder / f"{self._writer:04d}-{name}.safetensors"
        write_atomically(shard, lambda path: save_file(frames, path, {"rows": json.dumps(rows)}))
        self._waiting = {}
        self._places.update({key: _Place(shard, *row) for key, row in rows.items()})

    def estimate(self, durations: NDArray[np.float32], numbers_per_second: float) -> int:
        """The bytes that the frames of recordings of these seconds take, each of which gives so many numbers.

        Unknown durations (NaN) count as the mean.
        Raises UserError if the disk has less space.
        """
        known = durations[~np.isnan(durations)]
        seconds = float(known.sum(dtype=np.float64)) * len(durations) / max(1, len(known))
        size = round(seconds * numbers_per_second * self.dtype.itemsize)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"--feature_cache: {seconds / 3600:.1f} h of audio take {size / 1e9:.1f} GB as {self.dtype}, found "
                f"{free / 1e9:.1f} GB free in {self.folder}; give a folder on a larger disk, or leave the flag out"
            )
        return size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # mapped files are not picklable; a data worker maps them itself


def _checksum(frames: Tensor) -> int:
    return zlib.crc32(frames.contiguous().view(torch.uint8).numpy().data)


def _read_places(shard: Path) -> dict[str, _Place]:
    """What a shard holds; a damaged one is named and removed, and holds nothing."""
    try:
        with safe_open(shard, "pt") as file:
            rows = json.loads(file.metadata()["rows"])
            return {key: _Place(shard, *rows[key]) for key in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is damaged (%s) and was removed; its utterances are computed again", shard, error)
        shard.unlink(missing_ok=True)
        return {}
