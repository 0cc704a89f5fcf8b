import time

import pytest
import torch
from torch import nn

from rwkv_speech.scoring.speed import Speed, Timer


class Encoder(nn.Module):
    def forward(self) -> None:
        time.sleep(0.05)


def test_a_timer_tells_reading_encoding_and_the_rest_apart():
    timer, encoder = Timer(torch.device("cpu")), Encoder()

    def slow_files():
        for number in range(2):
            time.sleep(0.1)
            yield number

    with timer.run(encoder):
        for _ in timer.read(slow_files()):
            encoder()
            time.sleep(0.2)
    encoder()  # outside: not counted
    assert timer.seconds == pytest.approx({"reading": 0.2, "encoding": 0.1, "decoding": 0.4}, rel=0.5)
    assert timer.seconds["encoding"] < timer.seconds["reading"] < timer.seconds["decoding"]


def test_processes_side_by_side_take_as_long_as_the_slowest():
    slow = {"reading": 1.0, "encoding": 2.0, "decoding": 3.0}
    speed = Speed(100.0, [slow, {"reading": 4.0, "encoding": 1.0, "decoding": 1.0}])
    assert speed.times_real_time == 20.0
    assert speed.summary() == {
        "processes": 2, "audio_seconds": 100.0, "times_real_time": 20.0,
        "reading_seconds": 4.0, "encoding_seconds": 2.0, "decoding_seconds": 3.0,
    }  # fmt: skip
    assert speed.report() == "20.0 times real time (alone: reading 25, encoding 50, decoding 33), 2 processes"
    assert ", 2 processes" not in Speed(100.0, [slow]).report()
