import pytest
import torch
from sounds import samples, sounds

from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.reader import Reader, Reading
from rwkv_speech.decoding.transcribe import SpeechLM

LENGTHS = [3_000, 6_000, 1_450, 16_000]


def test_an_utterance_out_of_a_padded_batch_is_read_as_if_alone(model: SpeechLM):
    reader = Reader(model)
    alone = samples(sounds(LENGTHS))
    for one, padded in zip(alone, collate(alone).samples(), strict=True):
        [first], [second] = reader.encode([one]), reader.encode([padded])
        assert torch.equal(first.audio, second.audio)
        (logits, state), (again, other) = (reader.prefill([encoded], [Reading("asr")]) for encoded in (first, second))
        assert torch.equal(logits, again) and all(map(torch.equal, state, other))


def test_audio_tokens_are_those_of_a_batch_up_to_rounding(model: SpeechLM):
    together = samples(sounds(LENGTHS))
    audio, lengths = model.audio_tokens(collate(together))
    for sample, expected in zip(together, audio.split(lengths.tolist()), strict=True):
        torch.testing.assert_close(Reader(model).encode([sample])[0].audio, expected, rtol=1e-4, atol=1e-5)


def test_frames_of_a_feature_cache_take_the_place_of_the_encoder(model: SpeechLM):
    [sample] = samples(sounds([6_000]))
    frames, lengths = model.frames(collate([sample]))
    cached = type(sample)("c", torch.zeros(0), "", [], sample.duration, 0, "asr", frames=frames[0, : int(lengths)])
    assert torch.equal(Reader(model).encode([cached])[0].audio, Reader(model).encode([sample])[0].audio)


@pytest.mark.parametrize(("before", "after"), [([], []), ([7, 8], []), ([], [9]), ([7], [9, 8])])
def test_prefill_reads_prompts_audio_and_separator_in_order(model: SpeechLM, before: list[int], after: list[int]):
    [sample] = samples(sounds([6_000]))
    [encoded] = Reader(model).encode([sample])
    embed = model.lm.embed
    parts = embed(torch.tensor(before, dtype=torch.int64)), encoded.audio, embed(torch.tensor([*after, 36]))
    with torch.no_grad():
        expected = model.lm(inputs_embeds=torch.cat(parts)[None], state=model.initial_state(["asr"]))
    logits, state = Reader(model).prefill([encoded], [Reading("asr", before, after)])
    torch.testing.assert_close(logits, expected.logits[:, -1], rtol=1e-4, atol=1e-4)
    for found, wanted in zip(state, expected.state, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_rows_read_together_have_one_shape_and_the_numbers_of_each_alone(
    model: SpeechLM, monkeypatch: pytest.MonkeyPatch
):
    """What a GPU does, on a CPU: any number of utterances of one size, in any places, at the same shapes."""
    reader, shapes = Reader(model, rows=4), set[tuple[int, ...]]()
    linear = torch.nn.functional.linear

    def noted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        shapes.add((*x.shape, *rest[0].shape))
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    chosen = samples(sounds([5_800, 6_000, 6_100, 5_700]))
    assert len({reader.size(sample) for sample in chosen}) == 1
    alone = [reader.encode([sample])[0] for sample in chosen]
    heads = [reader.prefill([one], [Reading("asr", [7, 8], [9])])[0] for one in alone]
    assert shapes
    first = set(shapes)
    for order in ([0, 1, 2, 3], [3, 1], [2, 3, 0]):
        together = reader.encode([chosen[i] for i in order])
        logits, state = reader.prefill(together, [Reading("asr", [7, 8], [9])] * len(together))
        assert len(logits) == state.wkv.shape[1] == len(order)
        for place, i in enumerate(order):
            assert torch.equal(together[place].audio, alone[i].audio)
            assert torch.equal(logits[place], heads[i][0])
    assert shapes == first
    for sample, one, head in zip(chosen, alone, heads, strict=True):
        [exact] = Reader(model).encode([sample])
        torch.testing.assert_close(one.audio, exact.audio, rtol=1e-4, atol=1e-5)
        expected, _ = Reader(model).prefill([exact], [Reading("asr", [7, 8], [9])])
        torch.testing.assert_close(head, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 399, 400, 401, 5_000, 16_000, 123_456, 480_000])
def test_the_padded_size_holds_the_utterance_and_little_more(model: SpeechLM, length: int):
    [sample] = samples([torch.zeros(length)])
    size = Reader(model, rows=8).size(sample)
    assert max(length, 400) <= size <= max(length * 1.125 + 1, 400)
    assert Reader(model).size(sample) == length
