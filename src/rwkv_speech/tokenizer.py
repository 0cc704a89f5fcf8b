"""The RWKV World tokenizer: greedy longest match over UTF-8 bytes.

Encoding is the Rust package's; decoding is our own, because the Rust one panics on a partial character and
on an id outside the table, both of which a language model does produce.
"""

import ast
import codecs
import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from rwkv_speech.errors import UserError

EOS_ID = 0
_MAX_ID = 65_535
_MAX_ERRORS_SHOWN = 20


class WorldTokenizer:
    """Text <-> ids of the RWKV World vocabulary (65,529 tokens), or of a vocabulary file of the same format.

    Every line of `vocab_file` is `<id> <Python literal of a str or bytes> <length in bytes>`; id 0 is
    reserved for the end of text and stands for no bytes. Raises UserError for a file that is not that.
    """

    eos_id = EOS_ID

    def __init__(self, vocab_file: str | Path | None = None) -> None:
        self.vocab_file = Path(vocab_file) if vocab_file is not None else _packaged_vocab()
        self._is_packaged = vocab_file is None
        self._bytes_of = _read_vocab(self.vocab_file)
        self.vocab_size = max(self._bytes_of) + 1

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; the string "<s>" is text like any other, never id 0.

        Raises UserError for text that UTF-8 cannot hold (a lone surrogate).
        """
        try:
            return self._rust.encode(text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"text {text!r} holds a lone surrogate at character {error.start}; expected valid Unicode: mend it"
            ) from error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Concatenate the bytes of `ids`; id 0 and ids without a token (any integer) add nothing."""
        return b"".join(self._bytes_of.get(int(i), b"") for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def ids_with(self, part: bytes) -> list[int]:
        """The ids of all tokens that hold these bytes."""
        return [i for i, token in self._bytes_of.items() if part in token]

    def incremental(self) -> "IncrementalDecoder":
        """Start a decoder that takes one id at a time and gives out whole characters only."""
        return IncrementalDecoder(self)

    @cached_property
    def sha256(self) -> str:
        """The digest of the table (ids and bytes), the same for any spelling of the same vocabulary."""
        digest = hashlib.sha256()
        for i, token in sorted(self._bytes_of.items()):
            digest.update(b"%d %d " % (i, len(token)) + token)
        return digest.hexdigest()

    @cached_property
    def _rust(self) -> Any:
        # Loaded at the first encode: it costs 0.3 s, and what only decodes never needs it.
        import pyrwkv_tokenizer

        encoder = pyrwkv_tokenizer.WorldTokenizer(str(self.vocab_file))
        if not self._is_packaged:
            self._check_reads_alike(encoder)
        return encoder

    def _check_reads_alike(self, encoder: Any) -> None:
        # The Rust reader has its own idea of escapes; a token is always the longest match for its own text.
        for i, token in self._bytes_of.items():
            try:
                text = token.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if encoder.encode(text) != [i]:
                raise UserError(
                    f"{self.vocab_file}: token {i} ({text!r}) is read differently by pyrwkv-tokenizer; "
                    "expected literals as Python's repr() writes them: write the file so"
                )

    def __getstate__(self) -> dict[str, Any]:
        # The Rust object cannot be pickled; a data worker loads its own.
        return {key: value for key, value in self.__dict__.items() if key != "_rust"}


class IncrementalDecoder:
    """Turns a stream of ids into text without ever splitting a character."""

    def __init__(self, tokenizer: WorldTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the characters it completes, possibly none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """Return U+FFFD for a character left incomplete, else nothing, and start over."""
        return self._utf8.decode(b"", final=True)


def _packaged_vocab() -> Path:
    import pyrwkv_tokenizer

    return Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")


def _read_vocab(path: Path) -> dict[int, bytes]:
    """Parse a vocabulary file to {id: bytes}, naming every malformed line."""
    try:
        # Split at newlines only: str.splitlines would also cut inside literals that hold U+2028 and the like.
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a vocabulary ({error}); expected a UTF-8 text file") from error
    table: dict[int, bytes] = {}
    seen: set[bytes] = set()
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token_id, token = _parse_line(line)
            if token_id in table or token in seen:
                raise ValueError(f"repeats id {token_id} or token {token!r}")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            problems.append(f"  line {number}: {error}")
            continue
        table[token_id] = token
        seen.add(token)
    if problems:
        head = f"{path}: {len(problems)} malformed lines; expected `<id> <str or bytes literal> <length in bytes>`:"
        raise UserError("\n".join([head, *problems[:_MAX_ERRORS_SHOWN]]))
    missing = [byte for byte in range(256) if bytes([byte]) not in seen]
    if missing:
        # The Rust encoder drops a byte that no token starts with, silently.
        raise UserError(
            f"{path}: no token for {len(missing)} of the 256 single bytes, the first 0x{missing[0]:02x}; "
            "expected all of them, so that any text can be encoded: add them"
        )
    return table


def _parse_line(line: str) -> tuple[int, bytes]:
    id_text, _, rest = line.partition(" ")
    literal, _, length_text = rest.rpartition(" ")
    token_id, length = int(id_text), int(length_text)
    value = ast.literal_eval(literal)
    if not isinstance(value, (str, bytes)):
        raise ValueError(f"expected a str or bytes literal, found {literal!r}")
    token = value.encode("utf-8") if isinstance(value, str) else value
    if len(token) != length or not token:
        raise ValueError(f"says {length} bytes, the literal has {len(token)}; expected the same, 1 or more")
    if not 1 <= token_id <= _MAX_ID:
        raise ValueError(f"id {token_id}; expected 1 to {_MAX_ID} (0 is the end of text)")
    return token_id, token
