"""Flags of the server."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_speech.config.decoding import DecodeFlags
from rwkv_speech.config.forms import CHECKPOINT_HELP, STATE_HELP
from rwkv_speech.config.model import ModelConfig, check_one_device
from rwkv_speech.errors import UserError
from rwkv_speech.flags import flag


@dataclass(frozen=True)
class BoundFlags:
    """What one person may ask for, of the server and of the page; the status of an answer beyond it is named here."""

    group: ClassVar[str] = "serving"
    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0: all, for other machines")
    port: int = flag(8000, "where it listens; 0: any that is free", at_most=65535, at_least=0)
    max_upload_mb: float = flag(25.0, "most megabytes of a request (413)", above=0, at_most=2000)
    max_audio_seconds: float = flag(3600.0, "most seconds of a recording (413)", above=0, at_most=360_000)
    max_turn_seconds: float = flag(60.0, "most seconds of audio in a message of a chat (413)", above=0, at_most=3600)
    max_sessions: int = flag(64, "conversations that are remembered, each a state; another forgets one", at_least=1)
    session_seconds: float = flag(1800.0, "a conversation is forgotten after such a silence", above=0, at_most=604_800)
    max_requests: int = flag(64, "most requests that wait or are decoded (503)", at_least=1, at_most=10_000)
    request_seconds: float = flag(600.0, "most seconds until it is answered (503)", above=0, at_most=86_400)

    @property
    def is_local(self) -> bool:
        """Whether programs of this machine alone can reach it."""
        return self.host in ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class LimitFlags(BoundFlags):
    """What a client of the server may ask for; beyond each the answer is an error, whose status is named here."""

    api_keys: str = flag("", "file of the keys that clients may have, one a line; empty: none is asked for (401)")
    max_streams: int = flag(16, "realtime connections at once (503)", at_least=1, at_most=10_000)
    stream_seconds: float = flag(3600.0, "most seconds of such a connection, and of its audio", above=0)
    idle_seconds: float = flag(60.0, "it is closed after so many seconds without a word of the client", above=0)
    max_client_requests: int = flag(64, "most of these that one key has, or one address (429)", at_least=1)
    upload_seconds: float = flag(60.0, "most seconds until a request has arrived (408)", above=0, at_most=3600)


@dataclass(frozen=True)
class _ServingFlags(DecodeFlags, ModelConfig):
    group: ClassVar[str] = "run"
    micro_bsz: int = flag(8, "pieces of audio that are decoded together", at_least=1)
    checkpoint: str = flag("", CHECKPOINT_HELP)
    state: str = flag("", STATE_HELP)

    def check(self) -> None:
        """Raises UserError for flags that have no effect here, or on one device."""
        check_one_device(self)
        if self.word_timestamps:
            raise UserError("--word_timestamps: has no effect on a server, whose clients ask for them; leave it out")


@dataclass(frozen=True)
class ServeConfig(LimitFlags, _ServingFlags):
    """python -m rwkv_speech serve"""


@dataclass(frozen=True)
class _PageFlags(BoundFlags):
    group: ClassVar[str] = "serving"
    port: int = flag(7860, "where it listens; 0: any that is free", at_most=65535, at_least=0)


@dataclass(frozen=True)
class PageConfig(_PageFlags, _ServingFlags):
    """python -m rwkv_speech page"""
