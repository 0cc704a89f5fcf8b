"""Mutated audio files and lines of manifests: what our readers make of them, and what FFmpeg alone does.

`python tests/fuzzing.py files SEED FIRST LAST` reads the files of these numbers and prints a line for each finding, and
so does `lines` with manifests. It is a process of its own, since a decoder that crashes takes its process with it.
"""

import faulthandler
import io
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import torch
from hard_files import encode, hard_files, sound, tones

from rwkv_speech.audio import SAMPLE_RATE, AudioError, audio_seconds, load_audio, read_blocks
from rwkv_speech.data.inputs import find_inputs
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.tables import open_table
from rwkv_speech.errors import UserError

# Seconds of processor time that a file may take, for each reader; of a clock until the process is stopped.
MOST_SECONDS, STUCK_SECONDS = 2.0, 120
ROUNDING = 0.1
Mutation = Callable[[random.Random, bytearray], bytearray]
ENCODERS = """
wav:pcm_u8 wav:pcm_s24le wav:pcm_f32le wav:pcm_alaw wav:adpcm_ima_wav wav:adpcm_yamaha w64:pcm_s16le aiff:pcm_s16be
au:pcm_s16be caf:pcm_s16le caf:alac voc:pcm_u8 sox:pcm_s32le ircam:pcm_s16le flac:flac mp2:mp2 mp3:libmp3lame adts:aac
ipod:alac mov:pcm_s16le 3gp:aac matroska:pcm_s16le matroska:ac3 asf:wmav1 ac3:ac3 eac3:eac3 tta:tta wv:wavpack
mpegts:mp2 mpeg:mp2 avi:pcm_s16le avi:libmp3lame flv:aac nut:pcm_s16le g722:g722 sbc:sbc ast:pcm_s16be_planar
""".split()
SOUNDS = """
WAV:ULAW WAV:IMA_ADPCM WAVEX:PCM_24 RF64:PCM_16 W64:FLOAT AIFF:PCM_U8 AU:PCM_32 SVX:PCM_16 NIST:PCM_16 VOC:PCM_16
MAT5:PCM_16 IRCAM:ALAW PVF:PCM_16 XI:DPCM_16 HTK:PCM_16 SDS:PCM_16 AVR:PCM_16 WVE:ALAW MPC2K:PCM_16 FLAC:PCM_24
OGG:OPUS
""".split()


@cache
def originals() -> dict[str, bytes]:
    """Whole files of every kind that can be made here: of FFmpeg's encoders, of libsndfile's, and hard ones."""
    files = {name: content for name, (content, _) in hard_files().items()}
    for name in ENCODERS:
        form, codec = name.split(":")
        with suppress(av.FFmpegError, ValueError):  # not in every build of FFmpeg
            files[name] = encode(form, codec, 48_000 if codec.endswith("ac3") else 16_000)
    for name in SOUNDS:
        form, subtype = name.split(":")
        with suppress(RuntimeError, ValueError):  # not in every build of libsndfile
            files[name] = sound(tones(), form, subtype)
    return files


def mutated(seed: int, number: int) -> tuple[str, bytes]:
    """The file of a number: what it was made of, and its bytes."""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice(sorted(originals()))
    changes = [rng.choice(MUTATIONS) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    return f"{name} {' '.join(change.__name__ for change in changes)}", changed(rng, originals()[name], changes)


def changed(rng: random.Random, content: bytes, changes: list[Mutation]) -> bytes:
    for change in changes:
        content = bytes(change(rng, bytearray(content))) or b"\0"
    return content


def mutated_line(seed: int, number: int) -> bytes:
    """A manifest's line: a row with strange values, then strange bytes, or one of the two."""
    rng = random.Random(f"{seed}/{number}")
    row: dict[str, Any] = {"audio_filepath": "a.wav", "text": "so it is", "duration": 1.5, "offset": 0.25}
    row |= {"lang": "en", "task": "asr", "id": "x", "speaker": "ann", "more": [1, {"a": None}]}
    row = {key: row[key] for key in rng.sample(sorted(row), rng.randrange(1, len(row)))} | dict(rng.sample(SOUND, 2))
    for _ in range(rng.choice([0, 0, 1, 2])):
        row[rng.choice(sorted(row))] = rng.choice(STRANGE)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    changes = [rng.choice([flip, cut, behead, insert, drop, repeat, wipe]) for _ in range(rng.choice([0, 0, 0, 1, 2]))]
    return changed(rng, line.replace(b'"BIG"', b"9" * 400), changes)


SOUND: list[tuple[str, Any]] = [("audio_filepath", "a.wav"), ("text", "so it is"), ("duration", 1.5)]
STRANGE: list[Any] = [
    None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**30, "BIG", "", "\0", "\ud800", "a" * 70_000, [], {},
    [[[1]]], {"a": "}\n{"}, "../a.wav", "/dev/zero", ".", "b.wav", "\u2028\x85", "1.5", 1e-320, -0.0,
]  # fmt: skip


def flip(rng: random.Random, x: bytearray) -> bytearray:
    for _ in range(rng.choice([1, 3, 30, 300])):
        x[rng.randrange(len(x))] ^= 1 << rng.randrange(8)
    return x


def header(rng: random.Random, x: bytearray) -> bytearray:
    for _ in range(rng.choice([1, 2, 4])):
        x[rng.randrange(min(200, len(x)))] = rng.randrange(256)
    return x


def number(rng: random.Random, x: bytearray) -> bytearray:
    at = rng.randrange(min(rng.choice([64, 300, 10**9]), len(x)))
    values = [0, 1, 2, 0x7F, 0x80, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, rng.randrange(2**32)]
    x[at : at + 4] = rng.choice(values).to_bytes(4, rng.choice(["little", "big"]))
    return x


def cut(rng: random.Random, x: bytearray) -> bytearray:
    return x[: rng.randrange(len(x))]


def behead(rng: random.Random, x: bytearray) -> bytearray:
    return x[rng.randrange(len(x)) :]


def insert(rng: random.Random, x: bytearray) -> bytearray:
    at, length = rng.randrange(len(x)), rng.choice([1, 7, 500, 20_000])
    return x[:at] + rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)]) + x[at:]


def wipe(rng: random.Random, x: bytearray) -> bytearray:
    at, length = rng.randrange(len(x)), rng.choice([1, 50, 500, 5_000])
    x[at : at + length] = rng.choice([bytes, rng.randbytes])(min(length, len(x) - at))
    return x


def drop(rng: random.Random, x: bytearray) -> bytearray:
    at = rng.randrange(len(x))
    return x[:at] + x[at + rng.choice([1, 4, 100, 4_000]) :]


def repeat(rng: random.Random, x: bytearray) -> bytearray:
    first, last = sorted(rng.randrange(len(x)) for _ in range(2))
    return x[:last] + x[first:]


def splice(rng: random.Random, x: bytearray) -> bytearray:
    other = originals()[rng.choice(sorted(originals()))]
    return x[: rng.randrange(len(x))] + other[rng.randrange(len(other)) :]


MUTATIONS: list[Mutation] = [
    flip, header, header, number, number, cut, behead, insert, wipe, drop, repeat, splice,
]  # fmt: skip


def ffmpeg_seconds(content: bytes) -> float | None:
    """The seconds that FFmpeg decodes by itself; None where it has a complaint, or finds nothing."""
    seconds, links = 0.0, content.count(b"OggS\0\x02")
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as complaints, av.open(io.BytesIO(content), metadata_errors="ignore") as container:
            stream = container.streams.best("audio")
            for frame in container.decode(stream) if stream is not None else ():
                seconds += frame.samples / frame.sample_rate
    except (av.FFmpegError, ValueError, RuntimeError, ArithmeticError, MemoryError):
        return None
    finally:
        av.logging.set_level(None)
    return None if complaints or links > 1 else seconds or None


def findings(content: bytes, file: Path) -> Iterator[str]:
    """What is wrong with what our readers make of a file."""
    file.write_bytes(content)
    results = {}
    for name, read in READERS.items():
        started = time.process_time()
        try:
            results[name] = read(content, file)
        except AudioError as error:
            results[name] = "AudioError"
            if "\n" in str(error) or not str(error).startswith("F: "):
                yield f"{name} says {str(error)!r}"
        except Exception as error:
            yield f"{name} raises {error!r}"
            return
        if (took := time.process_time() - started) > MOST_SECONDS:
            yield f"{name} takes {took:.1f} s"
    whole, seconds = results.pop("load_audio"), results.pop("audio_seconds")
    for name, other in results.items():
        if not equal(whole, other):
            yield f"{name} gives {describe(other)}, load_audio {describe(whole)}"
    if not isinstance(whole, torch.Tensor):
        return
    length = len(whole) / SAMPLE_RATE
    if believed(content, length):
        return
    if not isinstance(seconds, float) or abs(seconds - length) > ROUNDING:
        yield f"audio_seconds gives {seconds}, load_audio {length:.3f}"
    theirs = ffmpeg_seconds(content)
    if theirs is not None and abs(length - theirs) > ROUNDING:
        yield f"load_audio gives {length:.3f} s, FFmpeg {theirs:.3f}"


def believed(content: bytes, length: float) -> bool:
    """Whether this is the length that a FLAC's header claims, which libsndfile believes.

    A wrong rate is not noticed, and of a wrong length only what lies 8 KB before the file's end: a known limit.
    """
    field = int.from_bytes(content[18:26], "big")  # rate: 20 bits; channels 3; bits of a sample 5; samples 36
    rate, total = field >> 44, field & (1 << 36) - 1
    return content[:4] == b"fLaC" and rate > 0 and abs(total / rate - length) < 1e-3


def equal(one: torch.Tensor | str, other: torch.Tensor | str) -> bool:
    """Both unreadable, or the same number of samples, which differ by rounding."""
    if isinstance(one, str) or isinstance(other, str):
        return str(one) == str(other)
    if len(one) != len(other) or not len(one):
        return len(one) == len(other)
    return bool((one - other).abs().max() <= 1e-4 * (1 + one.abs().max()))


def line_findings(line: bytes, folder: Path) -> Iterator[str]:
    """What is wrong with what the readers of manifests make of a line among others."""
    plain = b'{"audio_filepath": "a.wav", "text": "x"}\n'
    manifest = folder / "m.jsonl"
    for file in folder.glob("*.arrow"):
        file.unlink()
    manifest.write_bytes(plain + line + b"\n" + plain * 3)
    results: list[Any] = []
    for read in (read_manifest, lambda path: [*map((table := open_table(path)).utterance, range(len(table)))]):
        started = time.process_time()
        try:
            results.append(read(manifest))
        except UserError:
            results.append(None)
        except Exception as error:
            yield f"raises {error!r}"
            return
        if (took := time.process_time() - started) > MOST_SECONDS:
            yield f"takes {took:.1f} s"
    if results[0] != results[1]:
        yield f"read_manifest gives {results[0]}, open_table {results[1]}"
    try:
        inputs, faults = find_inputs([str(manifest)])
    except Exception as error:
        yield f"find_inputs raises {error!r}"
        return
    if results[0] is not None and (faults or {found.offset for found in inputs} != {x.offset for x in results[0]}):
        yield f"find_inputs gives {inputs} and {faults}"


def describe(found: object) -> str:
    return f"{len(found) / SAMPLE_RATE:.4f} s" if isinstance(found, torch.Tensor) else str(found)


READERS = {
    "load_audio": lambda content, file: load_audio(file, name="F"),
    "load_audio of bytes": lambda content, file: load_audio(content, name="F"),
    "read_blocks": lambda content, file: torch.cat(list(read_blocks(file, 0.3, name="F"))),
    "audio_seconds": lambda content, file: audio_seconds(file, name="F"),
}


def main(kind: str, seed: int, first: int, last: int) -> None:
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.wav").write_bytes(originals()["24.caf"])
        for number in range(first, last):
            name, content = mutated(seed, number) if kind == "files" else ("line", mutated_line(seed, number))
            print(f"at {number} {name}", flush=True)
            faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
            found = findings(content, Path(folder, "F")) if kind == "files" else line_findings(content, Path(folder))
            for finding in found:
                print(f"FOUND {number} {name}: {finding}", flush=True)
            faulthandler.cancel_dump_traceback_later()
    print(f"DONE {last - first} {kind}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
