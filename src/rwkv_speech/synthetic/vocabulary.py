"""A vocabulary of a text: byte-level BPE, written in the World vocabulary's format."""

from collections.abc import Iterable
from pathlib import Path

from rwkv_speech.synthetic.phones import PHONES


def write_vocabulary(path: Path, texts: Iterable[str], size: int) -> None:
    """Write a vocabulary of about `size` tokens: the 256 bytes, the phones, and the commonest pieces of `texts`.

    Pieces are those of byte-level BPE with GPT-2's splitting; a text is then read by the longest match, as with the
    World vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = [bytes([byte]) for byte in range(256)]
    known = dict.fromkeys([*first, *(phone.encode() for phone in PHONES)])
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(known) + 256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bytes_of = _bytes_of_letters()
    for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        token = bytes(bytes_of[letter] for letter in piece)
        if _is_text(token):
            known[token] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(
            f"{i} {(token.decode() if _is_text(token) else token)!r} {len(token)}\n"
            for i, token in enumerate(known, start=1)
        )
    )


def _is_text(token: bytes) -> bool:
    """A piece that cuts a character in two is left out: the bytes can spell it."""
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of byte-level BPE stands for: itself if it is printable, else those from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
