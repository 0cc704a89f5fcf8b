"""The frozen language model with its tokenizer, and whether they are what the flags say."""

from rwkv_speech.devices import Compute
from rwkv_speech.errors import UserError
from rwkv_speech.models.base import LMSizes
from rwkv_speech.models.families import read_lm
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.tokenizer import WorldTokenizer


def build_text_model(parts: Parts, compute: Compute) -> tuple[RWKV, WorldTokenizer]:
    """The frozen language model of filled `parts` and its tokenizer; raises UserError for files that do not fit."""
    base = parts.base_file()
    lm = read_lm(base, compute.lm_dtype, compute.device, compute.wkv6, compute.fuse, parts.quant or "")
    tokenizer = WorldTokenizer(parts.vocabulary())
    if tokenizer.vocab_size > lm.sizes.vocab:
        raise UserError(
            f"{base}: found {lm.sizes.vocab} embeddings, but the vocabulary {tokenizer.vocab_file} has ids up to "
            f"{tokenizer.vocab_size - 1}; give the vocabulary of this model with --vocab_file"
        )
    return lm, tokenizer


def check_sizes(parts: Parts, sizes: LMSizes) -> None:
    """Raises UserError if --n_layer or --n_embd contradicts the base model's file."""
    for name, said, found in (("n_layer", parts.n_layer, sizes.n_layer), ("n_embd", parts.n_embd, sizes.C)):
        if said not in (None, found):
            raise UserError(
                f"--{name}: given {said}, but {parts.load_model} has {found}; leave it empty, or give the right file "
                "with --load_model"
            )


def one_token(tokenizer: WorldTokenizer, text: str) -> int:
    """The id of a separator; raises UserError for text that is not one token."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"--separator: {text!r} is {len(ids)} tokens, expected exactly one, such as '#'")
    return ids[0]
