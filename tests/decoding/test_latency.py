import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_speech.decoding.latency import Instance, laal, listen, mean_laal, write_instances
from rwkv_speech.decoding.streaming import Committed, Event, Partial


def oracle(times: list[Fraction], source: Fraction, reference: int) -> Fraction:
    """As SimulEval writes it, step by step."""
    if times[0] > source:
        return times[0]
    gamma = Fraction(max(len(times), reference)) / source
    total, tau = Fraction(0), 0
    for t_minus_1, d in enumerate(times):
        total += d - t_minus_1 / gamma
        tau = t_minus_1 + 1
        if d >= source:
            break
    return total / tau


def test_laal_is_that_of_the_definition():
    rng = random.Random(0)
    for _ in range(500):
        source = Fraction(rng.randrange(1, 9000))
        times = sorted(Fraction(rng.randrange(0, 10_000)) for _ in range(rng.randrange(1, 12)))
        reference = rng.randrange(0, 15)
        expected = oracle(times, source, reference)
        assert laal([float(x) for x in times], float(source), reference) == pytest.approx(float(expected), abs=1e-6)


def test_laal_of_an_ideal_speaker_is_his_first_word_and_of_a_whole_recording_its_length():
    assert laal([250, 500, 750, 1000], 1000, 4) == 250
    assert laal([1000] * 4, 1000, 4) == 1000
    assert laal([500, 1000], 1000, 4) == laal([500, 1000, 1000, 1000], 1000, 2) == (500 + 750) / 2
    with pytest.raises(ValueError, match="no words"):
        laal([], 1000, 4)


class Scripted:
    """A stream that commits a text after so many pushes, and takes 0.25 s for each."""

    def __init__(self, texts: dict[int, str], last: str) -> None:
        self._texts, self._last, self.num_pushed, self.seconds = texts, last, 0, 0.0

    def push(self, samples: Tensor) -> list[Event]:
        self.num_pushed += 1
        self.seconds += 0.25
        text = self._texts.get(self.num_pushed)
        return [Partial("never counted")] + ([Committed(text, [])] if text else [])

    def finish(self) -> list[Event]:
        self.seconds += 0.25
        return [Committed(self._last, [])]


def test_listen_times_each_word_by_the_audio_and_by_the_clock():
    stream: Any = Scripted({1: "one", 3: "ty two"}, " three four")
    waveform, reference = torch.zeros(16_000), "ninety two three"
    found = listen(stream, waveform, 3_200, 7, "a.wav", reference, clock=lambda: stream.seconds)
    assert stream.num_pushed == 5
    assert (found.prediction, found.prediction_length, found.source_length) == ("onety two three four", 4, 1000.0)
    # A word is there when its last letter is.
    assert found.delays == [600.0, 600.0, 1000.0, 1000.0]
    # Each push takes 250 ms of 200: the audio waits.
    assert found.elapsed == pytest.approx([950.0, 950.0, 1700.0, 1700.0])
    assert found.reference_length == 3 and mean_laal([found]) == pytest.approx((600 + 350 + 500) / 3)
    assert mean_laal([found], computation_aware=True) == pytest.approx((950 + 700 + 1200) / 3)


def test_listen_times_characters_where_a_script_has_no_blanks():
    stream: Any = Scripted({1: "今日", 2: "は 晴"}, "れ")
    found = listen(stream, torch.zeros(3_200), 1_600, reference="今日 は", characters=True, clock=lambda: 0.0)
    assert (found.prediction, found.prediction_length, found.reference_length) == ("今日は晴れ", 5, 3)
    assert found.delays == found.elapsed == [100.0, 100.0, 200.0, 200.0, 200.0]


def test_recordings_without_words_do_not_count():
    silent = Instance(0, "", 1000.0, "", 0, [], [], "a")
    spoken = Instance(1, "", 1000.0, "a", 1, [500.0], [600.0], "a")
    assert mean_laal([silent, spoken]) == 500 and math.isnan(mean_laal([silent]))


def test_the_log_has_the_fields_that_its_readers_take(tmp_path: Path):
    instances = [Instance(i, f"{i}.wav", 900.0, "ä b", 2, [300.0, 600.0], [310.0, 640.0], "ä b") for i in range(2)]
    write_instances(tmp_path / "instances.log", instances)
    rows = [json.loads(line) for line in (tmp_path / "instances.log").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 and rows[1]["index"] == 1
    for row in rows:
        # OmniSTEval 0.1.10: `source` names the recording; as many times (ms) as words; `source_length` in ms.
        assert isinstance(row["source"], str) and row["source_length"] == 900.0
        assert len(row["prediction"].split()) == len(row["delays"]) == len(row["elapsed"]) == row["prediction_length"]
        # SimulEval 1.1.4 needs these, too.
        assert {"index", "reference"} <= row.keys()
