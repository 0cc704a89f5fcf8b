"""Teach frozen RWKV language models to hear: RWKV([initial state], [adapter](speech encoder(audio))) -> text."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["RWKV6", "SpeechLM", "wkv6"]
_HOME = {
    "RWKV6": "rwkv_speech.models.rwkv6",
    "SpeechLM": "rwkv_speech.decoding.transcribe",
    "wkv6": "rwkv_speech.ops.wkv6",
}


def __getattr__(name: str) -> Any:
    # The public names are imported when they are first used: `import rwkv_speech` alone costs nothing.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
