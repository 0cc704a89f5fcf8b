import pickle
import random
import time
from pathlib import Path

import pytest
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_speech.errors import UserError
from rwkv_speech.tokenizer import WorldTokenizer

BYTES = [f"{i + 1} {(chr(i) if i < 128 else bytes([i]))!r} 1" for i in range(256)]
MULTILINGUAL = "naïve Straße, 今天天气很好。 мы здесь! こんにちは 👩‍👩‍👧 🏳️‍🌈 हिन्दी עברית <s> \x00\r\n\t don't 12.5%"


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    return WorldTokenizer()


def write_vocab(folder: Path, *more: str) -> Path:
    file = folder / "vocab.txt"
    file.write_text("\n".join([*BYTES, *more]) + "\n", encoding="utf-8")
    return file


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    blocks = [
        (32, 127),
        (0, 32),
        (0xA0, 0x500),
        (0x900, 0x980),
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    pieces = [" the", "ing ", "今天", "  ", "\n\n", " Hello", "<s>", "—", "ção", "000"]

    def piece() -> str:
        if rng.random() < 0.3:
            return rng.choice(pieces)
        low, high = rng.choice(blocks)
        return chr(rng.randrange(low, high)) * rng.choice((1, 1, 1, 4))

    return ["".join(piece() for _ in range(rng.randint(0, 40))) for _ in range(count)]


def test_encode_agrees_with_the_reference_tokenizer(world: WorldTokenizer):
    import rwkv

    (folder,) = rwkv.__path__
    reference = TRIE_TOKENIZER(str(Path(folder) / "rwkv_vocab_v20230424.txt"))
    for text in [*random_texts(2_000), MULTILINGUAL]:
        ids = world.encode(text)
        assert ids == reference.encode(text), text
        assert world.decode(ids) == text


def test_world_vocabulary_is_the_published_one(world: WorldTokenizer):
    assert world.vocab_size == 65_530
    assert world.encode("#") == [36] and world.encode("") == []
    # The digest of the table, whatever the file's line ends: both packages ship the same vocabulary.
    import rwkv

    (folder,) = rwkv.__path__
    assert WorldTokenizer(Path(folder) / "rwkv_vocab_v20230424.txt").sha256 == world.sha256


def test_loading_is_quick():
    started = time.perf_counter()
    WorldTokenizer()
    assert time.perf_counter() - started < 3  # 0.4 s measured; a loaded machine gets some grace


def test_decode_takes_every_id(world: WorldTokenizer):
    every = range(65_536)
    assert isinstance(world.decode(every), str)
    assert all(isinstance(world.decode([i]), str) for i in every)
    # Only the end of text and the ids behind the table stand for nothing.
    assert [i for i in every if not world.decode_bytes([i])] == [0, *range(65_530, 65_536)]
    assert world.decode_bytes([-1, 10**9]) == b""


def test_end_of_text_is_never_encoded_and_decodes_to_nothing(world: WorldTokenizer):
    assert world.eos_id == 0
    ids = world.encode("a<s>b\x00")
    assert 0 not in ids and world.decode([*ids, 0]) == "a<s>b\x00"


def test_partial_characters_decode_to_the_replacement(world: WorldTokenizer):
    # Token i + 1 is the single byte i.
    assert world.decode([0xE4 + 1]) == "\ufffd"
    assert world.decode([66, 0xE4 + 1, 66]) == "A\ufffdA"


@pytest.mark.parametrize("text", [MULTILINGUAL, "𠜎𠜱𡿺 𐍈 🦊🦉", "\U0010fffd"])
def test_incremental_equals_whole(world: WorldTokenizer, text: str, tmp_path: Path):
    for tokenizer in (world, WorldTokenizer(write_vocab(tmp_path))):
        ids, decoder = tokenizer.encode(text), tokenizer.incremental()
        pieces = [decoder.push(i) for i in ids]
        assert "".join(pieces) == text and decoder.flush() == ""
        assert "\ufffd" not in "".join(pieces)


def test_incremental_equals_whole_for_random_ids(world: WorldTokenizer):
    rng = random.Random(1)
    for _ in range(300):
        # Mostly single bytes, so that characters are cut, over-long and out of order.
        ids = [rng.choice((rng.randrange(129, 257), rng.randrange(65_536))) for _ in range(20)]
        decoder = world.incremental()
        assert "".join(decoder.push(i) for i in ids) + decoder.flush() == world.decode(ids)


def test_incremental_flush_ends_a_cut_character(world: WorldTokenizer):
    decoder = world.incremental()
    assert (decoder.push(0xE4 + 1), decoder.flush(), decoder.push(66)) == ("", "\ufffd", "A")


def test_small_vocabulary_file(tmp_path: Path):
    more = ["257 'three' 5", "258 ' three' 6", "260 'é\\n' 3", '261 "it\'s" 4', "262 b'\\xe4\\xbb' 2"]
    small = WorldTokenizer(write_vocab(tmp_path, *more))
    assert small.encode("#three three#") == [36, 257, 258, 36]
    assert small.encode("it's é\n今") == [261, 33, 260, 262, 0x8A + 1]
    assert small.decode([261, 259, 0, 300]) == "it's"
    assert small.vocab_size == 263 and small.encode("<s>") == [61, 116, 63]


def test_tokenizer_can_be_pickled_after_use(tmp_path: Path):
    small = WorldTokenizer(write_vocab(tmp_path, "257 'ab' 2"))
    small.encode("ab")
    assert pickle.loads(pickle.dumps(small)).encode("abc") == [257, 100]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("257 'ab' 3", "says 3 bytes"),
        ("257 'ab 2", "unterminated"),
        ("257", "invalid literal"),
        ("x 'ab' 2", "invalid literal"),
        ("257 ab 2", "malformed node"),
        ("257 12 2", "expected a str or bytes literal"),
        ("257 __import__('os') 2", "malformed node"),
        ("0 'ab' 2", "id 0"),
        ("65536 'ab' 2", "id 65536"),
        ("36 'ab' 2", "repeats id 36"),
        ("257 '#' 1", "repeats .*token b'#'"),
        ("257 '' 0", "0 bytes"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, reason: str):
    with pytest.raises(UserError, match=f"(?s)vocab.txt: 1 malformed.*line 257: .*{reason}"):
        WorldTokenizer(write_vocab(tmp_path, line))


def test_vocabulary_without_every_byte_is_refused(tmp_path: Path):
    file = tmp_path / "vocab.txt"
    file.write_text("1 'a' 1\n")
    with pytest.raises(UserError, match="255 of the 256 single bytes"):
        WorldTokenizer(file)
    with pytest.raises(UserError, match="cannot be read"):
        WorldTokenizer(tmp_path / "missing.txt")


def test_ids_with_names_every_token_that_holds_the_bytes(world: WorldTokenizer):
    found = world.ids_with(b"\n\n")
    assert {261, 3336} <= set(found) and all(b"\n\n" in world.decode_bytes([i]) for i in found)
    assert len(found) == sum(b"\n\n" in world.decode_bytes([i]) for i in range(world.vocab_size))


def test_encode_names_lone_surrogates(world: WorldTokenizer):
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        world.encode("ab\ud800")
