from pathlib import Path

from rwkv_speech.synthetic.phones import PHONES
from rwkv_speech.synthetic.vocabulary import write_vocabulary
from rwkv_speech.tokenizer import WorldTokenizer

TEXTS = ["the weather is good", "el tiempo está bueno", "погода хорошая", "l'été, déjà 12 €", "天气很好"] * 20


def test_vocabulary_reads_any_text_and_knows_frequent_words(tmp_path: Path):
    write_vocabulary(tmp_path / "vocab.txt", iter(TEXTS), 600)
    tokenizer = WorldTokenizer(tmp_path / "vocab.txt")
    for text in [*TEXTS[:5], "unseen: ñandú 🎉 \n\n", "".join(PHONES)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" weather")) == len(tokenizer.encode(" хорошая")) == len(tokenizer.encode("#")) == 1
    assert all(len(tokenizer.encode(phone)) == 1 for phone in PHONES)
    assert tokenizer.vocab_size <= 601


def test_vocabulary_repeats(tmp_path: Path):
    for name in "ab":
        write_vocabulary(tmp_path / name, iter(TEXTS), 500)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
