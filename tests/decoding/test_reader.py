import pytest
import torch
from sounds import samples, sounds

from rwkv_speech.data.loader import collate
from rwkv_speech.decoding.reader import Reader
from rwkv_speech.decoding.transcribe import SpeechLM

LENGTHS = [3_000, 6_000, 1_450, 16_000]


def test_an_utterance_out_of_a_padded_batch_is_read_as_if_alone(model: SpeechLM):
    reader = Reader(model)
    alone = samples(sounds(LENGTHS))
    for one, padded in zip(alone, collate(alone).samples(), strict=True):
        first, second = reader.encode(one), reader.encode(padded)
        assert torch.equal(first.audio, second.audio)
        (logits, state), (again, other) = (reader.prefill(encoded, "asr") for encoded in (first, second))
        assert torch.equal(logits, again) and all(map(torch.equal, state, other))


def test_audio_tokens_are_those_of_a_batch_up_to_rounding(model: SpeechLM):
    together = samples(sounds(LENGTHS))
    audio, lengths = model.audio_tokens(collate(together))
    for sample, expected in zip(together, audio.split(lengths.tolist()), strict=True):
        torch.testing.assert_close(Reader(model).encode(sample).audio, expected, rtol=1e-4, atol=1e-5)


def test_frames_of_a_feature_cache_take_the_place_of_the_encoder(model: SpeechLM):
    [sample] = samples(sounds([6_000]))
    frames, lengths = model.frames(collate([sample]))
    cached = type(sample)("c", torch.zeros(0), "", [], sample.duration, 0, "asr", frames=frames[0, : int(lengths)])
    assert torch.equal(Reader(model).encode(cached).audio, Reader(model).encode(sample).audio)


@pytest.mark.parametrize(("before", "after"), [([], []), ([7, 8], []), ([], [9]), ([7], [9, 8])])
def test_prefill_reads_prompts_audio_and_separator_in_order(model: SpeechLM, before: list[int], after: list[int]):
    [sample] = samples(sounds([6_000]))
    encoded = Reader(model).encode(sample)
    embed = model.lm.embed
    parts = embed(torch.tensor(before, dtype=torch.int64)), encoded.audio, embed(torch.tensor([*after, 36]))
    with torch.no_grad():
        expected = model.lm(inputs_embeds=torch.cat(parts)[None], state=model.initial_state(["asr"]))
    logits, state = Reader(model).prefill(encoded, "asr", before, after)
    torch.testing.assert_close(logits, expected.logits[:, -1], rtol=1e-4, atol=1e-4)
    for found, wanted in zip(state, expected.state, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
