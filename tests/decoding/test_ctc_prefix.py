"""What the CTC head hears of a text's beginning, against the sum over all paths and all texts."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from sounds import samples, sounds
from torch import Tensor

from rwkv_speech.batch import Sample
from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.ctc_prefix import Prefix, PrefixScorer, Spelling
from rwkv_speech.decoding.engine import Engine, Request
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.rescoring import log_prob
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.models.ctc import CtcHead, CtcSpec

SPEC = CtcSpec("ab é")


class Tokens:
    """A tokenizer of a few tokens: some append several characters, some half a one, 8 a character without a label."""

    eos_id = 0
    table = (b"", b"a", b"ab", b"b ", "é".encode(), "é".encode()[:1], "é".encode()[1:], b"aa", b"X")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.table[i] for i in ids)


@pytest.fixture
def spelling() -> Spelling:
    return Spelling(SPEC, Tokens(), len(Tokens.table))  # type: ignore[arg-type] (it does what is asked of it)


def random_ctc(num_frames: int, seed: int) -> Tensor:
    return (3 * torch.randn(num_frames, 5, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def walk(scorer: PrefixScorer, ids: Iterable[int]) -> Prefix:
    text = scorer.start
    for token in ids:
        [_, [text]] = scorer.after([scorer.start, text], [[7, 3], [token]])  # beside others
    return text


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_totals_are_those_of_all_texts_that_begin_so(spelling: Spelling, num_frames: int):
    ctc = random_ctc(num_frames, num_frames)
    texts = defaultdict[str, float](float)
    for path in itertools.product(range(5), repeat=num_frames):
        text = "".join(SPEC.labels[x - 1] for x, _ in itertools.groupby(path) if x)
        texts[text] += math.exp(sum(float(ctc[t, x]) for t, x in enumerate(path)))
    scorer = PrefixScorer(ctc, spelling, foresight=0.0)
    for ids in itertools.product((1, 2, 3, 4, 7), repeat=2):
        for so_far in (ids[:1], ids):
            begun = Tokens().decode_bytes(so_far).decode()
            prefix, expected = walk(scorer, so_far), sum(p for text, p in texts.items() if text.startswith(begun))
            assert math.exp(prefix.total) == pytest.approx(expected, rel=1e-6, abs=1e-12)
            assert math.exp(prefix.ended().total) == pytest.approx(texts[begun], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("num_frames", [40, 1500])
def test_whole_texts_are_as_probable_as_by_the_ctc_loss(spelling: Spelling, num_frames: int):
    chance, ctc = random.Random(num_frames), random_ctc(num_frames, 1)
    scorer = PrefixScorer(ctc, spelling)
    for _ in range(20):
        ids = chance.choices((1, 2, 3, 4, 7), k=chance.randint(0, 12))
        [[ended]] = scorer.after([walk(scorer, ids)], [[Tokens.eos_id]])
        expected = log_prob(ctc, SPEC, Tokens().decode_bytes(ids).decode())
        assert ended.total == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_no_token_adds_more_than_is_hoped(spelling: Spelling):
    scorer, tokens = PrefixScorer(random_ctc(9, 2), spelling, foresight=0.0), list(range(len(Tokens.table)))
    texts = [walk(scorer, ids) for ids in ((), (1,), (2, 3), (4, 5), (7, 7))]
    hopes = scorer.hopes(texts)
    for text, row, hope in zip(texts, scorer.after(texts, [tokens] * len(texts)), hopes, strict=True):
        for token, prefix in enumerate(row):
            assert prefix.total == -math.inf or prefix.total - text.total <= hope[token] + 1e-4
            if token in (1, 4) and not text.rest:  # one label: that is what it adds
                assert prefix.total - text.total == pytest.approx(float(hope[token]), abs=1e-4)


def test_frames_that_are_left_count(spelling: Spelling):
    """What was prefix late in the audio has less before it; a whole text costs the same with and without foresight."""
    ctc = torch.full((6, 5), -9.0)
    ctc[:3, 1] = ctc[3:, 2] = 2.0  # "a" and then "b", neither surely
    near, far = (PrefixScorer(ctc.log_softmax(-1), spelling, foresight) for foresight in (0.0, 4.0))
    assert near.start.total == 0 and far.start.total == pytest.approx(4 * float(ctc.log_softmax(-1).amax(1).sum()))
    gains = [walk(scorer, (2,)).total - walk(scorer, (1,)).total for scorer in (near, far)]
    assert gains[0] < 0 < gains[1]
    assert walk(near, (2, 0)).total == walk(far, (2, 0)).total


def test_a_character_may_come_in_parts_and_must_be_a_label(spelling: Spelling):
    scorer = PrefixScorer(random_ctc(9, 3), spelling)
    assert walk(scorer, (1, 5, 6)).total == walk(scorer, (1, 4)).total
    [[half, ended, other, again]] = scorer.after([walk(scorer, (1, 5))], [[6, 0, 1, 5]])
    assert half.total > -math.inf and {ended.total, other.total, again.total} == {-math.inf}
    assert scorer.after([scorer.start], [[8]])[0][0].total == scorer.hopes([scorer.start])[0, 8] == -math.inf


@pytest.fixture
def hearing(restrict: Callable[[dict[int, float]], SpeechLM]) -> Iterator[SpeechLM]:
    """A model that knows the end, "a", "b" and "!", and hears "a" and "b"; to write "!" is easiest."""
    model = restrict({0: 0.0, ord("a") + 1: 0.0, ord("b") + 1: 0.0, ord("!") + 1: 3.0})
    assert model.tokenizer.encode("ab!") == [98, 99, 34]
    torch.manual_seed(3)
    model.ctc = CtcHead(model.encoder.width, CtcSpec("ab")).eval()
    with torch.no_grad():
        model.ctc.out.weight.mul_(4.0)
    yield model
    model.ctc = None


@torch.no_grad()
def likelihood(model: SpeechLM, sample: Sample, ids: tuple[int, ...]) -> float:
    """The language model's log-probability of a text and its end."""
    audio, _ = model.audio_tokens(collate([sample]))
    text = model.lm.embed(torch.tensor([model.separator_id, *ids]))
    output = model.lm(inputs_embeds=torch.cat((audio, text))[None], state=model.initial_state([sample.task]))
    following = output.logits[0, len(audio) :].double().log_softmax(-1)
    return float(following[range(len(ids) + 1), [*ids, 0]].sum())


def test_a_search_finds_the_best_of_both_scores(hearing: SpeechLM):
    chosen, limit, weight = samples(sounds([3_000, 5_000])), 4, 0.7
    options = Options.given(0.0, beam=32, patience=10.0, length_penalty=0.0, ctc_weight=weight)
    requests = [Request(sample.index, sample, limit) for sample in chosen]
    for done in Engine(hearing, options, 1).run(requests):
        assert done.ctc is not None and hearing.ctc is not None
        expected = {
            ids: likelihood(hearing, done.request.sample, ids)
            + weight * log_prob(done.ctc, hearing.ctc.spec, hearing.tokenizer.decode(ids))
            for length in range(limit + 1)
            for ids in itertools.product((98, 99), repeat=length)
        }
        # Of tokens that the model has: none has a "!", which is no label.
        ended = {text.ids: text.score for text in done.hypotheses if not text.cut and text.score > -60}
        assert len(ended) == 31 and ended == pytest.approx(expected, abs=1e-3)
        assert done.hypotheses[0].ids == max(expected, key=expected.__getitem__)


def test_what_is_not_spoken_is_not_listened_to(hearing: SpeechLM):
    [sample] = samples(sounds([3_000]))
    options = Options.given(0.0, beam=4, ctc_weight=1.0)
    hearing.initial_states["st_fr"] = hearing.initial_states["asr"]
    try:
        [done] = Engine(hearing, options, 1).run([Request(0, replace(sample, task="st_fr"), 4)])
    finally:
        del hearing.initial_states["st_fr"]
    assert 34 in done.hypotheses[0].ids
