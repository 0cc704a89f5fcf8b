import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.errors import UserError
from rwkv_speech.synthetic.espeak import Synthesizer, Voice
from rwkv_speech.synthetic.phones import PHONES, phones_of
from rwkv_speech.synthetic.speech_pool import FRAMING, frame_labels
from rwkv_speech.synthetic.voices import TEST_VARIANTS, TRAIN_VARIANTS


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    return Synthesizer()


def test_say_gives_sound_and_phones_in_order(synthesizer: Synthesizer):
    speech = synthesizer.say("seven", Voice("en-us"))
    names = [plain for name, _ in speech.phonemes for plain in phones_of(name)]
    assert names == ["s", "ɛ", "v", "ə", "n"]
    starts = [start for _, start in speech.phonemes]
    assert starts == sorted(starts) and starts[-1] <= len(speech.samples)
    assert 0.1 < np.abs(speech.samples).max() <= 1.0
    assert len(speech.waveform()) == pytest.approx(len(speech.samples) * SAMPLE_RATE / speech.sample_rate, abs=2)


def test_corpus_repeats_exactly_in_a_new_process(tmp_path: Path):
    """Not within one: eSpeak's noise generator goes on from call to call."""
    for name in ("a", "b"):
        words = ["--out", str(tmp_path / name), "--train", "4", "--valid", "1", "--test", "2"]
        subprocess.run(
            [sys.executable, "-m", "rwkv_speech.synthetic.make_corpus", *words], check=True, capture_output=True
        )
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 3 + 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_say_follows_the_rate(synthesizer: Synthesizer):
    slow, fast = (len(synthesizer.say("the weather is good", Voice(rate=rate)).samples) for rate in (110, 230))
    assert slow > 1.4 * fast


def test_words_and_pauses(synthesizer: Synthesizer):
    text = "the dog waits & sleeps <here>"
    speech = synthesizer.say("the dog waits behind", Voice("en-us"), [0, 500, 100])
    assert len(speech.words) == 4 and speech.words == sorted(speech.words)
    gaps = np.diff(speech.words) / speech.sample_rate
    plain = np.diff(synthesizer.say("the dog waits behind", Voice("en-us")).words) / speech.sample_rate
    assert len(plain) == 3 and 0.4 < gaps[1] - plain[1] < 0.9 and gaps[2] - plain[2] < 0.4
    third = speech.words[2]
    assert np.abs(speech.samples[third - speech.sample_rate // 4 : third - 100]).max() < 0.01
    assert len(synthesizer.say(text, Voice("en-us"), [50] * 5).samples) > 0


def test_say_names_an_unknown_voice(synthesizer: Synthesizer):
    with pytest.raises(UserError, match="no voice 'nowhere'"):
        synthesizer.say("a", Voice("nowhere"))


def test_every_voice_speaks(synthesizer: Synthesizer):
    for variant in TRAIN_VARIANTS + TEST_VARIANTS:
        assert np.abs(synthesizer.say("two", Voice(f"en-us+{variant}")).samples).max() > 0.02, variant


def test_another_process_says_the_same_a_second_later():
    """Some voices have noise, which eSpeak draws by the clock unless it is told otherwise."""
    script = (
        "import hashlib; from rwkv_speech.synthetic.espeak import Synthesizer, Voice; found = hashlib.sha256(); s = "
        "Synthesizer()\nfor name in ('en-us+victor', 'en-us-nyc+f2', 'en-gb-scotland+sandro') * 8:\n    "
        "found.update(s.say('the woman carried the clean black box', Voice(name)).samples.tobytes())\n"
        "print(found.hexdigest())"
    )
    said = []
    for _ in range(2):
        second = int(time.time())
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        said.append(done.stdout)
        time.sleep(max(0.0, second + 1 - time.time()))
    assert len(said[0]) > 60 and said[0] == said[1]


def test_test_voices_are_kept_apart():
    assert not set(TRAIN_VARIANTS) & set(TEST_VARIANTS)


def test_frame_labels_mark_silence_where_the_sound_is_low(synthesizer: Synthesizer):
    speech = synthesizer.say("one, two, three, four", Voice("en-us", rate=110))
    waveform = speech.waveform().numpy()
    labels = frame_labels(speech, "en", len(waveform))
    assert len(labels) == FRAMING.count(len(waveform))
    energy = np.array([np.square(waveform[i * 320 + 230 : i * 320 + 630]).mean() for i in range(len(labels))])
    silent = labels == PHONES.index("_")
    assert silent.any() and np.median(energy[silent]) < 0.01 * np.median(energy[~silent])
