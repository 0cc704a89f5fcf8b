"""Teach frozen RWKV language models to hear: RWKV([initial state], [adapter](speech encoder(audio))) -> text."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"
__all__ = ["RWKV6", "RWKV7", "AudioError", "Segment", "SpeechLM", "Transcript", "UserError", "Word", "wkv6", "wkv7"]
_HOME = {
    "AudioError": "rwkv_speech.errors",
    "RWKV6": "rwkv_speech.models.rwkv6",
    "RWKV7": "rwkv_speech.models.rwkv7",
    "Segment": "rwkv_speech.decoding.results",
    "SpeechLM": "rwkv_speech.decoding.transcribe",
    "Transcript": "rwkv_speech.decoding.results",
    "UserError": "rwkv_speech.errors",
    "Word": "rwkv_speech.decoding.results",
    "wkv6": "rwkv_speech.ops.wkv6",
    "wkv7": "rwkv_speech.ops.wkv7",
}


def __getattr__(name: str) -> Any:
    # The public names are imported when they are first used: `import rwkv_speech` alone costs nothing.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def _spin_count(loadavg: str, cores: int) -> str:
    """How often OpenMP's threads look for work before they sleep, from what /proc/loadavg says is running.

    By default they spin for milliseconds: on cores that other processes want, a training step then takes 10 to 80 times
    as long. 5,000 looks are as fast on idle cores, where 100 make a step 1.4 times slower; on wanted cores they are 1.5
    times slower than 100.
    """
    running = int(loadavg.split()[3].partition("/")[0])
    return "100" if running > cores else "5000"


# Read by torch when it loads; what the user has set stands.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} and os.path.exists("/proc/loadavg"):
    with open("/proc/loadavg") as _file:
        os.environ["GOMP_SPINCOUNT"] = _spin_count(_file.read(), os.cpu_count() or 1)
