import pytest

from rwkv_speech.config import PredictConfig
from rwkv_speech.decoding.options import Options
from rwkv_speech.errors import UserError


def test_options_of_a_command_are_its_flags():
    config = PredictConfig(beam=4, temperature="0,0.5", vad="none")
    found = Options.of(config)
    assert (found.beam, found.temperatures, found.vad) == (4, (0.0, 0.5), "none")
    assert Options.of(PredictConfig()) == Options.given()


@pytest.mark.parametrize(
    ("given", "expected"), [(0.7, (0.7,)), ((0, 0.4), (0.0, 0.4)), (None, (0, 0.2, 0.4, 0.6, 0.8, 1))]
)
def test_options_given_takes_a_number_or_several(given: object, expected: tuple[float, ...]):
    assert Options.given(given).temperatures == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("beam", 0), ("temperature", -0.1), ("temperature", (1, 0)), ("top_p", 0), ("vad", "loud"), ("length_penalty", 2)],
)
def test_options_out_of_range_name_the_flag(name: str, value: object):
    with pytest.raises(UserError, match=f"--{name}: found .*, expected "):
        Options.given(**{name: value})
