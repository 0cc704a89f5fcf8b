from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from rwkv_speech.batch import Sample
from rwkv_speech.data.dataset import SpeechDataset
from rwkv_speech.data.folder import FileSource
from rwkv_speech.data.loader import collate
from rwkv_speech.data.source import Utterance
from rwkv_speech.decoding.options import GREEDY
from rwkv_speech.models.ctc import CtcHead, CtcSpec
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.share import Part, Share, decode


@pytest.fixture(scope="module")
def model(tiny_parts: Parts) -> SpeechLM:
    torch.manual_seed(0)
    return SpeechLM.build(tiny_parts).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """Seven recordings, the last two broken; each of its own length."""
    folder = tmp_path_factory.mktemp("share")
    found = []
    for i in range(7):
        audio = folder / f"{i}.wav"
        soundfile.write(audio, np.random.default_rng(i).normal(0, 0.1, 8000 + 800 * i), 16000)
        if i > 4:
            audio.write_bytes(b"RIFF")
        found.append(Utterance(f"u{i}", str(audio), f"text {i}", duration=0.5 + 0.05 * i, speaker=f"s{i % 2}"))
    return FileSource(found)


def decoded(model: SpeechLM, share: Share, max_bad: int = 9) -> tuple[list[int], Part]:
    *counts, part = decode(model, share, 2, replace(GREEDY, max_new_tokens=5), "", max_bad)
    assert isinstance(part, Part)
    return [count for count in counts if isinstance(count, int)], part


def test_shares_are_together_the_whole(source: FileSource):
    shares = [Share(source, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert sorted(share.utterance(i).id for share in shares for i in range(len(share))) == [f"u{i}" for i in range(7)]
    assert shares[1].durations().tolist() == source.durations()[[1, 4]].tolist()
    assert torch.equal(shares[1].load(1), source.load(4)) and shares[1].fingerprint() == source.fingerprint()
    assert len(Share(source, 8, 9)) == 0


def test_what_is_found_does_not_depend_on_the_shares(model: SpeechLM, source: FileSource):
    counts, whole = decoded(model, Share(source))
    assert sum(counts) == 7 and len(whole.rows) == 5 and sorted(bad.id for bad in whole.bad) == ["u5", "u6"]
    parts = [decoded(model, Share(source, rank, 3))[1] for rank in range(3)]
    by_index = lambda rows: sorted(rows, key=lambda row: row.index)  # noqa: E731
    assert by_index(row for part in parts for row in part.rows) == by_index(whole.rows)
    assert by_index(bad for part in parts for bad in part.bad) == by_index(whole.bad)
    assert [(row.index, row.id, row.speaker) for row in by_index(whole.rows)] == [
        (i, f"u{i}", f"s{i % 2}") for i in range(5)
    ]
    assert set(whole.seconds) == {"reading", "encoding", "decoding"} and min(whole.seconds.values()) > 0


def test_more_broken_recordings_than_allowed_end_it(model: SpeechLM, source: FileSource):
    counts, part = decoded(model, Share(source), max_bad=0)
    assert 1 <= len(part.bad) <= 2 and sum(counts) <= 7
    assert decoded(model, Share(source, 8, 9)) == ([], Part())


def test_rows_hold_what_the_ctc_head_alone_hears(model: SpeechLM, source: FileSource, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    head = CtcHead(model.encoder.width, CtcSpec(" abc", hidden=8)).eval().requires_grad_(False)
    monkeypatch.setattr(model, "ctc", head)
    _, part = decoded(model, Share(source))
    dataset = SpeechDataset(source, model.tokenizer)
    for row in part.rows:
        sample = dataset[row.index]
        assert isinstance(sample, Sample) and [row.ctc] == model.ctc_texts(collate([sample]))
    assert any(row.ctc for row in part.rows)


def test_rows_say_where_their_audio_lies(model: SpeechLM, source: FileSource):
    _, part = decoded(model, Share(source, 1, 3))
    assert [(row.audio, row.offset, row.ctc) for row in part.rows] == [
        (source.utterance(row.index).audio, 0.0, None) for row in part.rows
    ]


def test_conversations_are_counted_once_and_have_a_row_for_each_turn(model: SpeechLM, source: FileSource):
    first, second, third, *_ = (source.utterance(i) for i in range(5))
    typed = Utterance("typed", None, "ref", input_text="hello")
    talk = replace(first, id="talk", then=(typed, second))
    share = Share(FileSource([third, talk]))
    counts, part = decoded(model, share)
    assert sum(counts) == 2 and len(counts) == 5  # rows, and the bad ones at the end
    rows = {row.place: row for row in part.rows}
    assert [rows[1, turn].id for turn in (1, 2, 3)] == ["talk#1", "talk#2", "talk#3"]
    assert [rows[1, turn].audio for turn in (1, 2, 3)] == [first.audio, None, second.audio]
    assert rows[0, 0].turn is None
    *_, again = decode(model, share, 2, replace(GREEDY, max_new_tokens=5), given_history=True)
    assert isinstance(again, Part)
    other = {row.place: row for row in again.rows}
    assert rows[1, 1].hyp == other[1, 1].hyp and rows[1, 3].hyp != other[1, 3].hyp
