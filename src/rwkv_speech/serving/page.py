"""A page to speak with the model: a microphone or files, text as it is recognised, conversations with memory."""

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.checks import before_serving
from rwkv_speech.config import PageConfig
from rwkv_speech.decoding.session import Session
from rwkv_speech.devices import compute_of
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving.page_view import aloud, downloads, link, picture, spoken
from rwkv_speech.serving.page_work import Answer, Desk, Heard, Live, Talking

logger = logging.getLogger(__name__)
_STREAM_SECONDS = 0.5  # of a part that the browser sends
_GRACE_SECONDS = 10  # for what is being answered when the page ends
_KEPT_SECONDS = 600  # an upload that is never used is deleted
_CSS = """
.spoken { font-size: 1.25rem; line-height: 1.5; min-height: 3em; margin: 0; padding-top: 1em; overflow-wrap: anywhere }
.partial { opacity: 0.6 }
.wave { overflow-x: auto; max-width: 100% }
.wave path { stroke: currentColor; stroke-width: 1.5; opacity: 0.5 }
.wave line { stroke: currentColor; opacity: 0.3 }
.wave text { fill: currentColor; font-size: 14px }
figure { margin: 0 }
figure audio { max-width: 100% }
.files a { display: inline-block; padding: 0.6em 0.8em; text-decoration: underline }
footer { display: none !important }
"""
# Texts that change are read out; what lies in another tab is not there until it is chosen.
_READ_OUT = """() => ['said', 'speed', 'answer_speed'].forEach(
    id => document.getElementById(id)?.setAttribute('aria-live', 'polite'))"""
# A recorder never sends the half second before its Stop: that comes so much later.
_STOP_LATER = """() => window.addEventListener('click', event => {
    const stop = event.target.closest('#microphone .stop-button, #talk .stop-button')
    if (!stop || !event.isTrusted) return
    event.stopPropagation()
    setTimeout(() => stop.click(), 700)
}, true)"""
_HIDDEN: dict[str, Any] = {"api_visibility": "private"}


def _in_order(microphone: str) -> dict[str, Any]:
    """Parts of one microphone are heard one after another."""
    return {**_HIDDEN, "concurrency_id": microphone, "concurrency_limit": 1, "show_progress": "hidden"}


class Page:
    """The page of one model; `blocks` is what gradio serves."""

    def __init__(self, desk: Desk, config: PageConfig) -> None:
        self._desk, self._config = desk, config
        # Nothing is told to others; what visitors upload is deleted when it has been heard, or never was.
        self.blocks = gr.Blocks(title="rwkv_speech", analytics_enabled=False, delete_cache=(60, _KEPT_SECONDS))
        with self.blocks:
            gr.Markdown("# Speak with rwkv_speech")
            with gr.Tab("Transcribe"):
                self._transcription()
            with gr.Tab("Conversation") as tab:
                self._conversation()
            self.blocks.load(None, js=_STOP_LATER, **_HIDDEN)
            gr.on([self.blocks.load, tab.select], None, js=_READ_OUT, **_HIDDEN)
        self.blocks.state_session_capacity = config.max_sessions
        self.blocks.queue(max_size=config.max_requests, api_open=False, default_concurrency_limit=config.micro_bsz)

    def app(self) -> FastAPI:
        """What a web server runs."""
        return gr.mount_gradio_app(
            FastAPI(openapi_url=None), self.blocks, "/", self._config.host, self._config.port, [], False,
            show_error=False, allowed_paths=[], root_path="", ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, max_file_size=round(1e6 * self._config.max_upload_mb), css=_CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip

    def _task(self, default: str) -> gr.Dropdown:
        states = self._desk.states
        known = default if default in states else tasks.DEFAULT
        value = known if known in states else states[0]
        return gr.Dropdown(states, value=value, label="Task", info="the learned state", filterable=False)

    def _transcription(self) -> None:
        with gr.Row():
            task = self._task(tasks.DEFAULT)
            languages = [("not said", ""), *((name, name) for name in self._desk.languages)]
            language = gr.Dropdown(languages, value="", label="Language", info="that is spoken", filterable=False,
                                   interactive=len(languages) > 1)  # fmt: skip
        with gr.Row():
            microphone = gr.Audio(sources=["microphone"], type="filepath", streaming=True, label="Microphone",
                                  elem_id="microphone", buttons=[])  # fmt: skip
            file = gr.Audio(sources=["upload"], type="filepath", label="Recording (file)", elem_id="file", buttons=[])
        said = gr.HTML(spoken(""), label="Text", show_label=True, container=True, elem_id="said")
        speed = gr.HTML("", elem_id="speed")
        wave, files = gr.HTML("", elem_id="wave"), gr.HTML("", elem_id="files")
        shown = [said, speed, wave, files]
        live = gr.State(None, time_to_live=self._config.session_seconds)
        one = _in_order("microphone")
        microphone.start_recording(lambda: (None, spoken(""), "", "", ""), None, [live, *shown], **one)
        microphone.stream(
            self._hear, [live, microphone, task, language], [live, *shown], stream_every=_STREAM_SECONDS, **one
        )
        microphone.stop_recording(self._finish, live, [live, *shown], **one)
        file.upload(self._transcribe, [file, task, language], [file, *shown], **_HIDDEN)

    async def _hear(self, live: Live | None, path: str | None, task: str, language: str) -> tuple[Any, ...]:
        if path is None or (part := taken_part(path)) is None:
            return live, *[gr.skip()] * 4
        live, heard = await told(self._desk.hear(live, part, task, language))
        return live, *_shown(heard)

    async def _finish(self, live: Live | None) -> tuple[Any, ...]:
        if live is None:
            return None, *[gr.skip()] * 4
        return None, *_shown(await told(self._desk.finish(live)))

    async def _transcribe(self, path: str | None, task: str, language: str) -> AsyncGenerator[tuple[Any, ...]]:
        if path is not None:
            async for heard in each(self._desk.transcribe(taken(path), task, language)):
                yield None, *_shown(heard)

    def _conversation(self) -> None:
        task = self._task("chat")
        turns = gr.Chatbot([], label="Conversation", elem_id="turns", height=320, render_markdown=False, buttons=[],
                           feedback_options=None, allow_tags=False)  # fmt: skip
        speed = gr.HTML("", elem_id="answer_speed")
        speaks = gr.Checkbox(False, label="Speak the answers", elem_id="speaks", interactive=self._desk.can_speak,
                             info="by a synthetic voice: eSpeak NG" if self._desk.can_speak else
                             "found no voice: pip install espeakng-loader")  # fmt: skip
        voice_out = gr.HTML("", elem_id="aloud")
        talk = gr.Audio(sources=["microphone"], type="filepath", streaming=True, elem_id="talk", buttons=[],
                        label="Your turns, spoken: a silence ends each", visible=self._desk.finds_turns)  # fmt: skip
        with gr.Row():
            text = gr.Textbox(label="Your turn, written", elem_id="written", submit_btn="Send", max_length=2000)
            voice = gr.Audio(sources=["upload"], type="filepath", label="Your turn, recorded (file)", elem_id="voice",
                             buttons=[], editable=False)  # fmt: skip
        with gr.Row():
            new, save = gr.Button("New conversation"), gr.Button("Save conversation")
            load = gr.UploadButton("Load conversation", type="filepath")
        saved = gr.HTML("", elem_id="saved")
        session = gr.State(None, time_to_live=self._config.session_seconds)
        changed = [session, turns, speed, saved, voice_out]
        known = [session, task, turns, speaks]
        self._turn_by_turn(talk, known, changed)
        voice.upload(self._say, [voice, *known], [voice, *changed], **_HIDDEN)
        text.submit(self._write, [text, *known], [text, *changed], **_HIDDEN)
        gr.on([new.click, turns.clear, task.input], lambda: (None, [], "", "", ""), None, changed, **_HIDDEN)
        save.click(self._save, session, saved, **_HIDDEN)
        load.upload(self._load, load, [task, *changed], **_HIDDEN)

    def _turn_by_turn(self, talk: gr.Audio, known: list[Any], changed: list[Any]) -> None:
        """A microphone that stays open: what is said up to a silence is answered, then it is heard again."""
        seconds = self._config.session_seconds
        talking, turn = gr.State(None, time_to_live=seconds), gr.State(None, time_to_live=seconds)
        one = _in_order("talk")
        talk.start_recording(lambda: (None, None), None, [talking, turn], **one)
        talk.stream(self._overhear, [talking, talk], [talking, turn], stream_every=_STREAM_SECONDS, **one)
        talk.stop_recording(self._last_turn, talking, turn, **one)
        turn.change(self._reply, [talking, turn, *known], changed, **_HIDDEN)

    async def _overhear(self, talking: Talking | None, path: str | None) -> tuple[Any, ...]:
        if path is None or (part := taken_part(path)) is None:
            return talking, gr.skip()
        talking, turn = await told(self._desk.overhear(talking, part))
        return talking, gr.skip() if turn is None else turn

    async def _last_turn(self, talking: Talking | None) -> Any:
        turn = None if talking is None else await told(self._desk.last_turn(talking))
        return gr.skip() if turn is None else turn

    async def _reply(self, talking: Talking | None, turn: Tensor | None, *known: Any) -> AsyncGenerator[Any]:
        if talking is None or turn is None:
            return
        try:
            async for found in self._answer(turn, "(spoken)", talking, *known):
                yield found
        finally:
            talking.is_answered = True

    async def _say(self, path: str | None, *known: Any) -> AsyncGenerator[Any]:
        if path is not None:
            async for found in self._answer(taken(path), "(spoken)", None, *known):
                yield None, *found

    async def _write(self, text: str, *known: Any) -> AsyncGenerator[Any]:
        if text.strip():
            async for found in self._answer(text, text, None, *known):
                yield "", *found

    async def _answer(
        self,
        said: bytes | str | Tensor,
        shown: str,
        talking: Talking | None,
        session: Session | None,
        task: str,
        turns: list[Any],
        speaks: bool,
    ) -> AsyncGenerator[tuple[Any, ...]]:
        turns = [*turns, {"role": "user", "content": shown}]
        answer: Answer
        async for answer in each(self._desk.answer(session, said, task)):
            found = [*turns, {"role": "assistant", "content": answer.text}]
            sound = ""
            if speaks and self._desk.can_speak and answer.session and answer.text.strip():
                speech = await asyncio.to_thread(self._desk.spoken, answer.text)
                sound = aloud(speech.wav())
                if talking:
                    talking.deaf_until = time.monotonic() + len(speech.samples) / speech.sample_rate
            yield answer.session or session, found, f"<p>{answer.speed}</p>", "", sound

    async def _save(self, session: Session | None) -> str:
        if session is None:
            raise gr.Error("there is no conversation yet; speak or write first", print_exception=False)
        return (
            f"<p class='files'>{link('conversation.session', await asyncio.to_thread(self._desk.saved, session))}</p>"
        )

    def _load(self, path: str) -> tuple[Any, ...]:
        try:
            session = self._desk.loaded(Path(path))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            Path(path).unlink(missing_ok=True)
        note = {"role": "assistant", "content": f"(a conversation of {session.num_turns} turns goes on)"}
        return session.task, session, [note], "", "", ""


def _shown(heard: Heard) -> tuple[str, ...]:
    text, speed, found = spoken(heard.text, heard.partial), f"<p>{heard.speed}</p>", heard.transcript
    return (text, speed, picture(found, heard.outline), downloads(found)) if found else (text, speed, "", "")


def taken(path: str) -> bytes:
    """What was uploaded, which is gone after it."""
    file = Path(path)
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise gr.Error("the recording is gone; give it again", print_exception=False) from error
    finally:
        file.unlink(missing_ok=True)


def taken_part(path: str) -> bytes | None:
    """A part of a microphone; None where it lay in one file with an equal part, as of silence, that was taken."""
    return taken(path) if Path(path).exists() else None


async def told(work: Any) -> Any:
    """What is waited for; what a visitor can mend is told on the page."""
    try:
        return await work
    except (UserError, HTTPException) as error:
        raise gr.Error(_message(error), print_exception=False) from error


async def each(parts: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
    """The same of what comes in parts."""
    try:
        async for part in parts:
            yield part
    except (UserError, HTTPException) as error:
        raise gr.Error(_message(error), print_exception=False) from error
    finally:
        await parts.aclose()


def _message(error: UserError | HTTPException) -> str:
    return error.detail if isinstance(error, HTTPException) else str(error)


def show(config: PageConfig) -> None:
    """Show the page until SIGTERM or Ctrl-C."""
    before_serving(config)
    if not config.is_local:
        logger.warning("warning: --host %s: whoever reaches this machine may use the page; browsers give the "
                       "microphone to localhost and https alone", config.host)  # fmt: skip
    model = SpeechLM.from_pretrained(config.checkpoint or Path(config.proj_dir), Parts.of(config), compute_of(config))
    model.add_states(config.state)
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # where gradio keeps uploads
        desk = Desk(model, config)
        page_server(desk, config).run()
        desk.close()


def page_server(desk: Desk, config: PageConfig) -> uvicorn.Server:
    """What answers at the address that the flags name, once it runs."""
    settings = uvicorn.Config(
        Page(desk, config).app(), host=config.host, port=config.port, access_log=False, server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )  # fmt: skip
    return uvicorn.Server(settings)
