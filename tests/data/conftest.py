"""A tokenizer of single bytes: byte b is token b + 1."""

from pathlib import Path

import pytest

from rwkv_speech.tokenizer import WorldTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> WorldTokenizer:
    file: Path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    file.write_text("".join(f"{i + 1} {(chr(i) if i < 128 else bytes([i]))!r} 1\n" for i in range(256)))
    return WorldTokenizer(file)
