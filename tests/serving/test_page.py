"""What the page shows, beside what the library finds without it; and the page itself in a real browser."""

import asyncio
import base64
import io
import re
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import srt
from hard_files import sound

from rwkv_speech.audio import as_waveform
from rwkv_speech.config import PageConfig
from rwkv_speech.decoding.results import Segment, Transcript, Word
from rwkv_speech.decoding.session import Session
from rwkv_speech.decoding.transcribe import SpeechLM
from rwkv_speech.decoding.writers import render
from rwkv_speech.errors import UserError
from rwkv_speech.serving.page_view import Outline, aloud, downloads, picture, spoken
from rwkv_speech.serving.page_work import Answer, Desk, Heard, Live, Talking
from serving.conftest import OPTIONS, noise, offline, wav


@pytest.fixture(scope="module")
def desk(model: SpeechLM) -> Iterator[Desk]:
    limits = {"max_audio_seconds": 5.0, "max_turn_seconds": 2.0, "micro_bsz": 4}
    desk = Desk(model, PageConfig(**{**OPTIONS, "temperature": "0", **limits}))
    yield desk
    desk.close()


def all_of(parts: AsyncGenerator[Any]) -> list[Any]:
    async def found() -> list[Any]:
        return [part async for part in parts]

    return asyncio.run(found())


def as_part(samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> bytes:
    """What a browser's recorder sends: a header that tells no length, and samples."""
    head = b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate, 0, 2 * channels, 16)
    return head + b"data\xff\xff\xff\xff" + samples.astype("<i2").tobytes()


def microphone(desk: Desk, samples: np.ndarray, size: int, task: str = "asr", language: str = "") -> list[Heard]:
    async def found() -> list[Heard]:
        live: Live | None = None
        heard = list[Heard]()
        for start in range(0, len(samples), size):
            live, part = await desk.hear(live, as_part(samples[start : start + size]), task, language)
            heard.append(part)
        assert live is not None
        return [*heard, await desk.finish(live)]

    return asyncio.run(found())


def answered(desk: Desk, session: Session | None, said: bytes | str, task: str = "chat") -> Answer:
    *parts, last = all_of(desk.answer(session, said, task))
    assert all(last.text.startswith(part.text.rstrip("\ufffd")) for part in parts) and parts
    assert last.session is not None and last.session is not session
    return last


def test_a_file_is_transcribed_in_parts_and_its_words_are_drawn(desk: Desk, model: SpeechLM):
    *parts, last = all_of(desk.transcribe(wav(3, 2.5)[1], "asr", ""))
    [expected] = model.transcribe(noise(3, 2.5), 4, "asr", **OPTIONS, word_timestamps=True)
    assert last.transcript == expected and last.text == expected.text != "" and expected.words
    assert parts and all(expected.text.startswith(part.text) for part in parts)
    assert f"{expected.seconds:.1f} s of audio in " in last.speed and "times real time" in last.speed
    drawn = picture(expected, last.outline)
    assert drawn.count("<text ") == len(expected.words) and f"with {len(expected.words)} words" in drawn
    assert len(last.outline.peaks) == int(50 * expected.seconds)


def test_a_microphone_says_what_the_same_samples_say_at_once(desk: Desk, model: SpeechLM):
    samples = noise(4, 2.5)
    *parts, last = microphone(desk, samples, 4_000)
    [expected] = model.transcribe(samples, 4, "asr", **OPTIONS, word_timestamps=True)
    assert last.transcript is not None and last.text.strip() == last.transcript.text == expected.text != ""
    assert [x.words for x in last.transcript.segments] == [x.words for x in expected.segments]
    assert any(part.partial for part in parts) and all(last.text.startswith(part.text) for part in parts)
    assert "Latency " in last.speed and last.transcript.seconds == pytest.approx(len(samples) / 16_000)


def test_parts_of_a_microphone_that_never_came_are_told(desk: Desk):
    async def found() -> list[str]:
        live, first = await desk.hear(None, as_part(noise(1, 0.5)), "asr", "")
        live.begun -= 0.6  # longer ago than there are parts
        live, second = await desk.hear(live, as_part(noise(1, 0.1)), "asr", "")
        return [first.speed, second.speed, (await desk.finish(live)).speed]

    first, *others = asyncio.run(found())
    assert "missing" not in first and all("Words may be missing: the browser sent" in speed for speed in others)


def test_task_and_language_choose_the_state(desk: Desk, model: SpeechLM):
    assert desk.states == ["asr", "asr_fr", "chat", "st_en"] and desk.languages == ["fr"]
    french = offline(model, 1, task="asr_fr").text
    assert all_of(desk.transcribe(wav(1)[1], "asr", "fr"))[-1].text == french != offline(model, 1).text
    assert all_of(desk.transcribe(wav(1)[1], "st_en", ""))[-1].text == offline(model, 1, task="st_en").text
    with pytest.raises(Exception, match="does not recognise speech"):
        all_of(desk.transcribe(wav(1)[1], "chat", "fr"))


def test_turns_are_remembered_and_go_on_from_a_file(desk: Desk, model: SpeechLM, tmp_path: Path):
    session, expected = Session(model, "chat"), list[str]()
    for said in (as_waveform(noise(2), ""), "and then", as_waveform(noise(5), "")):
        expected.append(session.say(said, **OPTIONS).text)
    first = answered(desk, None, wav(2)[1])
    second = answered(desk, first.session, "and then")
    (tmp_path / "a.session").write_bytes(desk.saved(second.session))  # type: ignore[arg-type]
    third = answered(desk, desk.loaded(tmp_path / "a.session"), wav(5)[1])
    assert [first.text, second.text, third.text] == expected
    # An answer changes nothing of what it goes on from, and without memory it is another.
    assert answered(desk, second.session, wav(5)[1]).text == expected[2] != answered(desk, None, wav(5)[1]).text


TALK = np.concatenate([noise(1, 1.0), np.zeros(24_000, np.int16), noise(2, 1.0), np.zeros(24_000, np.int16), noise(3)])


def test_a_silence_ends_a_turn_and_nothing_is_heard_until_it_is_answered(model: SpeechLM, vad_by_loudness: None):
    desk = Desk(model, PageConfig(**{**OPTIONS, "temperature": "0", "vad": "silero", "micro_bsz": 1}))
    assert desk.finds_turns

    async def turns(is_slow: bool) -> list[int]:
        talking: Talking | None = None
        found = list[int]()
        for start in range(0, len(TALK), 8_000):
            talking, turn = await desk.overhear(talking, as_part(TALK[start : start + 8_000]))
            if turn is not None:
                found.append(len(turn))
                assert not talking.is_answered
                talking.deaf_until = time.monotonic() + 60 * is_slow  # while the answer is spoken
                talking.is_answered = True
        assert talking is not None
        rest = await desk.last_turn(talking)
        return [*found, len(rest)] if rest is not None else found

    *turns_found, last = asyncio.run(turns(False))
    expected = [len(noise(number, seconds)) for number, seconds in ((1, 1.0), (2, 1.0), (3, 0.4))]
    assert [*turns_found, last] == pytest.approx(expected, abs=4_000)
    assert len(asyncio.run(turns(True))) == 1
    desk.close()


def test_a_part_that_went_with_an_equal_one_is_left_out(tmp_path: Path):
    from rwkv_speech.serving.page import taken_part

    path = tmp_path / "part.wav"
    path.write_bytes(b"silence")
    assert [taken_part(str(path)) for _ in range(2)] == [b"silence", None] and not path.exists()


def test_an_answer_is_spoken_and_marked_as_synthetic(desk: Desk):
    assert desk.can_speak
    speech = desk.spoken("the cat")
    shown = aloud(speech.wav())
    [content] = re.findall(r"base64,([^']+)'", shown)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert rate == speech.sample_rate and len(samples) == len(speech.samples) > rate // 4
    assert "Synthetic voice" in shown


def test_what_cannot_be_heard_is_said(desk: Desk, tmp_path: Path):
    with pytest.raises(UserError, match="the recording: lasts more than 5 s"):
        all_of(desk.transcribe(wav(1, 6.0)[1], "asr", ""))
    with pytest.raises(UserError, match="the recording: lasts more than 2 s"):
        all_of(desk.answer(None, wav(1, 3.0)[1], "chat"))
    with pytest.raises(UserError, match="the recording: cannot be decoded"):
        all_of(desk.transcribe(b"no audio" * 9, "asr", ""))
    with pytest.raises(UserError, match="the microphone: expected 16-bit WAV"):
        asyncio.run(desk.hear(None, b"\x1aE\xdf\xa3" * 30, "asr", ""))
    with pytest.raises(UserError, match="the microphone: found more than 5 s"):
        microphone(desk, noise(1, 6.0), 16_000)
    (tmp_path / "b.session").write_bytes(b"nothing")
    with pytest.raises(UserError, match="^the file: cannot be read as a session"):
        desk.loaded(tmp_path / "b.session")


def test_a_part_of_two_channels_at_another_rate(desk: Desk):
    stereo = np.repeat(noise(1, 1.0), 2)
    live, heard = asyncio.run(desk.hear(None, as_part(stereo, 48_000, 2), "asr", ""))
    assert live.seconds == pytest.approx(len(stereo) / 2 / 48_000) and heard.transcript is None


EVIL = "<script>alert('x')</script> & \"so\""


def test_texts_are_shown_as_text():
    words = [Word(EVIL, 0.5, 0.9, 1.0), Word(" end", 1.0, 1.2, 1.0)]
    segment = Segment(0, 0.5, 1.2, f"{EVIL} end", [], 0.0, 0.0, 1.0, 0.0, words=words)
    found, outline = Transcript(segment.text, [segment], 2.0, "asr"), Outline(16_000)
    outline.push(noise(1, 2.0))
    shown = spoken(EVIL, EVIL) + picture(found, outline) + downloads(found)
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 4
    # Where a word is drawn, and what its table says, is when it is said.
    assert "<line x1='60' " in shown and "<td>00:00.500</td><td>00:00.900</td>" in shown
    untimed = picture(Transcript("a", [Segment(0, 0.0, 2.0, "a", [], 0.0, 0.0, 1.0, 0.0)], 2.0, "asr"), outline)
    assert "with 1 segments" in untimed


def test_downloads_hold_the_files():
    segment = Segment(0, 0.5, 1.25, "an apple", [], 0.0, 0.0, 1.0, 0.0)
    found = re.findall(
        r"download='(\S+)' href='data:\S+;base64,(\S+)'", downloads(Transcript("an apple", [segment], 2.0, "asr"))
    )
    files = {name: base64.b64decode(content).decode() for name, content in found}
    assert set(files) == {"transcript.txt", "transcript.srt", "transcript.vtt", "transcript.json"}
    [cue] = srt.parse(files["transcript.srt"])
    assert cue.content == "an apple" and cue.end.total_seconds() == 1.25 and files["transcript.txt"] == "an apple\n"


def test_the_outline_is_the_loudest_sample_of_each_part_whatever_the_parts():
    samples = np.arange(-2_000, 1_300).astype(np.int16)
    whole, parts = Outline(16_000), Outline(16_000)
    whole.push(samples)
    for start in range(0, len(samples), 37):
        parts.push(samples[start : start + 37])
    expected = [max(abs(int(x)) for x in samples[i : i + 320]) / 2**15 for i in range(0, 3_200, 320)]
    assert whole.peaks.tolist() == parts.peaks.tolist() == pytest.approx(expected)


@contextmanager
def shown(desk: Desk, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the page, where no program named ffmpeg is found."""
    from rwkv_speech.serving.page import page_server

    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    server = page_server(desk, PageConfig(port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def browsing(address: str, microphone: Path) -> Iterator[Any]:
    """The page in Chromium as on a telephone, with a file in place of the microphone."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium", path="/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("no Chromium is installed")
    fake = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    flags = ["--no-sandbox", *fake, f"--use-file-for-fake-audio-capture={microphone}"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=flags)
        context = browser.new_context(permissions=["microphone"], viewport={"width": 375, "height": 700})
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.goto(address)
        yield page
        browser.close()


@pytest.mark.soak
def test_a_browser_shows_files_a_microphone_and_turns(
    desk: Desk, model: SpeechLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from playwright.sync_api import expect

    file, microphone = tmp_path / "a.wav", tmp_path / "microphone.wav"
    file.write_bytes(wav(3, 1.5)[1])
    microphone.write_bytes(wav(4, 30.0)[1])
    session, asked = Session(model, "chat"), list[str]()
    answers = [
        session.say(said, **OPTIONS).text for said in ("what is a dog", "and then", as_waveform(noise(3, 1.5), ""))
    ]
    with shown(desk, tmp_path, monkeypatch) as address, browsing(address, microphone) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.reload()
        page.locator("#file input[type=file]").set_input_files(file)
        page.get_by_text("transcript.srt").wait_for()
        [expected] = model.transcribe(noise(3, 1.5), 4, "asr", **OPTIONS)
        assert (page.locator("#said .spoken").text_content() or "").split() == expected.text.split() != []
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.locator("#said").get_attribute("aria-live") == "polite"
        with page.expect_download() as download:
            page.get_by_text("transcript.txt").click()
        assert Path(download.value.path()).read_text(encoding="utf-8") == render(expected, "txt")
        page.get_by_role("button", name="Record").first.click()
        expect(page.locator("#said .partial")).not_to_be_empty(timeout=120_000)
        page.locator("#microphone .stop-button").click()
        page.get_by_text("transcript.srt").wait_for()
        page.get_by_role("tab", name="Conversation").click()
        for said, answer in zip(("what is a dog", "and then", None), answers, strict=True):
            if said:
                page.get_by_label("Your turn, written").fill(said)
                page.get_by_role("button", name="Send").click()
            else:
                page.locator("#voice input[type=file]").set_input_files(file)
            expect(page.locator("#turns .bot.message").last).to_have_text(answer.strip(), timeout=120_000)
        assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
    assert not list(tmp_path.rglob("gradio/*/*.wav"))


@pytest.mark.soak
def test_a_browser_hears_turns_and_what_is_said_right_before_stop(
    model: SpeechLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vad_by_loudness: None
):
    from playwright.sync_api import expect

    desk = Desk(model, PageConfig(**{**OPTIONS, "temperature": "0", "vad": "silero", "micro_bsz": 1}))
    microphone = tmp_path / "microphone.wav"
    microphone.write_bytes(sound(np.tile(TALK[: -len(noise(3))], 8), "WAV"))
    with shown(desk, tmp_path, monkeypatch) as address, browsing(address, microphone) as page:
        page.get_by_role("button", name="Record").first.click()
        page.evaluate(
            "() => { window.clicks = [];"
            "addEventListener('click', x => clicks.push([performance.now(), x.isTrusted]), true) }"
        )
        expect(page.locator("#speed")).to_contain_text("of audio", timeout=120_000)
        page.locator("#microphone .stop-button").click()
        page.get_by_text("transcript.srt").wait_for()
        [(clicked, by_hand), (stopped, by_page)] = page.evaluate("clicks")
        assert (by_hand, by_page) == (True, False) and stopped - clicked >= 600  # parts are of half a second
        page.get_by_role("tab", name="Conversation").click()
        expect(page.locator("#answer_speed")).to_have_attribute("aria-live", "polite")
        page.get_by_label("Speak the answers").check()
        page.locator("#talk").get_by_role("button", name="Record").click()
        for number in (1, 2):
            expect(page.locator("#turns .bot.message")).to_have_count(number, timeout=120_000)
            expect(page.locator("#aloud audio")).to_have_count(1, timeout=120_000)
        page.locator("#talk .stop-button").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    desk.close()
    assert not list(tmp_path.rglob("gradio/*/*.wav"))
