"""How text is made of audio: the flags of decoding as Python takes them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_speech.config import DecodeFlags, numbers
from rwkv_speech.errors import UserError
from rwkv_speech.flags import unknown_flag

# Fast speech has 6 tokens a second in English and 14 in Russian; scripts that the vocabulary knows by bytes have up to
# 1.6 a letter (Khmer), 25 letters a second. A decoder that still runs at this rate is lost.
_TOKENS_PER_SECOND, _MIN_NEW_TOKENS = 50, 16


@dataclass(frozen=True)
class Options(DecodeFlags):
    """What config.DecodeFlags explains, whose ranges hold here, too; raises UserError for a value outside them."""

    @classmethod
    def of(cls, config: DecodeFlags) -> "Options":
        """The flags of a command that decodes."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def given(
        cls,
        temperature: float | Sequence[float] | None = None,
        keywords: str | Path | Sequence[str] = "",
        **others: Any,
    ) -> "Options":
        """From Python, where `temperature` is a number or several, and `keywords` a file or the lines of one."""
        if temperature is not None:
            several = temperature if isinstance(temperature, Sequence) else (temperature,)
            others["temperature"] = ",".join(f"{x:g}" for x in several)
        lines = str(keywords) if isinstance(keywords, str | Path) else tuple(keywords)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in set(others) - set(names):
            raise UserError(unknown_flag(f"--{name}", names))
        return cls(keywords=lines, **others)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The first is used, each further one where the text of the one before failed a threshold."""
        return numbers(self.temperature)

    @property
    def finds_language(self) -> bool:
        """Whether each recording's language is to be found."""
        return self.language == "auto"

    @property
    def given_language(self) -> str | None:
        """The language of recordings of which nothing else is known."""
        return None if self.finds_language else self.language or None

    def token_limit(self, seconds: float) -> int:
        """The most tokens of the text of so much audio."""
        return self.max_new_tokens or max(_MIN_NEW_TOKENS, int(_TOKENS_PER_SECOND * seconds))


# What validation decodes with: each utterance as it is, once.
GREEDY = Options.given(0.0, vad="none", max_segment=3600)
