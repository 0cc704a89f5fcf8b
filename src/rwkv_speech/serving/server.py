"""The server: the API of openai's audio client over one model on this machine."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi import Form as FormFields
from starlette.responses import JSONResponse, Response, StreamingResponse

from rwkv_speech.batch import BadSample
from rwkv_speech.checks import before_serving
from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Segment, Transcript
from rwkv_speech.devices import compute_of
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving import faults
from rwkv_speech.serving.answers import Deltas, answer
from rwkv_speech.serving.chat import Chat
from rwkv_speech.serving.connections import Quiet, impatient
from rwkv_speech.serving.events import Told, sent, while_there
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.form import Audio, Form, Order, TranslationForm
from rwkv_speech.serving.guard import Guard
from rwkv_speech.serving.metrics import Metrics
from rwkv_speech.serving.realtime import FRAME_BYTES, Realtime
from rwkv_speech.serving.worker import Worker

logger = logging.getLogger(__name__)
_LEAST_KEY = 16  # letters


class Service:
    """One model, its worker, and the application that asks it; `app` is what a web server runs."""

    def __init__(self, model: SpeechLM, config: ServeConfig, keys: Sequence[str] = ()) -> None:
        self._model, self._config, self._options = model, config, Options.of(config)
        self._worker = Worker(model, self._options, config.micro_bsz)
        self._created = int(time.time())
        api = FastAPI(title="rwkv_speech", lifespan=self._lifespan, openapi_url=None)
        faults.register(api)
        for path, answer_health in (("/health/live", self.live), ("/health/ready", self.ready)):
            api.add_api_route(path, answer_health, methods=["GET", "HEAD"])
        api.get("/metrics")(self.metrics)
        api.get("/v1/models")(self.models)
        api.get("/v1/models/{name}")(self.model)
        api.post("/v1/audio/transcriptions")(self.transcriptions)
        api.post("/v1/audio/translations")(self.translations)
        self._metrics = Metrics()
        self._chat = Chat(model, config, self._options, self._worker, self._metrics)
        api.post("/v1/chat/completions")(self._chat.completions)
        self.realtime = Realtime(model, config, self._options, self._worker, self._metrics)
        api.websocket("/v1/realtime")(self.realtime.connect)
        self.app = Guard(api, config, keys, self._metrics)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._worker.close)

    async def live(self) -> dict[str, str]:
        """Whether the process answers at all."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Whether another request would be taken."""
        is_ready = self._worker.is_alive and self.app.has_room
        return JSONResponse({"status": "ok" if is_ready else "busy"}, 200 if is_ready else 503)

    async def metrics(self) -> Response:
        """What Prometheus reads."""
        return self._metrics.response()

    async def models(self) -> dict[str, Any]:
        """Each learned state is a model."""
        return {"object": "list", "data": [self._described(name) for name in self._model.initial_states]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        if name not in self._model.initial_states:
            raise Fault(404, "there is no such model here; /v1/models lists all", "model_not_found", "model")
        return self._described(name)

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "rwkv_speech"}

    async def transcriptions(self, request: Request, form: Annotated[Form, FormFields()]) -> Response:
        """The transcript of a recording, whole or in parts."""
        order = await self._order(form)
        if form.stream:
            events = self._events(order, form)
            # What is wrong until the first event is answered with its own status.
            first = await while_there(request, anext(events))
            return StreamingResponse(sent(first, events), media_type="text/event-stream")
        return answer(form, await self._transcript(request, order), self._model.tokenizer)

    async def translations(self, request: Request, form: Annotated[TranslationForm, FormFields()]) -> Response:
        """What is said in a recording, in English."""
        wanted = form.transcription()
        found = await self._transcript(request, await self._order(wanted))
        return answer(wanted, found, self._model.tokenizer, "english")

    async def _order(self, form: Form) -> Order:
        audio = Audio(await form.file.read(), self._config.max_audio_seconds)
        await form.file.close()
        return await asyncio.to_thread(Order.of, form, audio, self._model, self._options)

    async def _transcript(self, request: Request, order: Order) -> Transcript:
        """What the worker finds; it is told to give up for a client that has gone, or when it takes too long."""
        told = self._told(order)
        await while_there(request, told.ended(self._config.request_seconds))
        return self._result(order, told)

    def _told(self, order: Order) -> Told[list[Segment], Transcript | BadSample]:
        return Told(partial(self._worker.submit, order.recording), partial(self._worker.cancel, order.recording.key))

    def _result(self, order: Order, told: Told[list[Segment], Transcript | BadSample]) -> Transcript:
        found = order.result(told.future, self._config.request_seconds)
        self._metrics.heard(found.seconds)
        return found

    async def _events(self, order: Order, form: Form) -> AsyncGenerator[dict[str, Any]]:
        """The transcript in parts, as soon as nothing can change them any more."""
        told, deltas = self._told(order), Deltas(form, self._model.tokenizer)
        async with aclosing(told.parts(self._config.request_seconds)) as parts:
            async for segments in parts:
                for event in deltas.of(segments):
                    yield event
        for event in deltas.done(self._result(order, told)):
            yield event


def read_keys(path: str) -> list[str]:
    """The keys in a file, one a line; raises UserError for a file that holds none, or short ones."""
    if not path:
        return []
    try:
        keys = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_keys: {path}: cannot be read; expected a text file of one key a line") from error
    if not keys or min(map(len, keys)) < _LEAST_KEY:
        raise UserError(
            f"--api_keys: {path}: expected keys of {_LEAST_KEY} letters at least, one a line; make longer ones"
        )
    return keys


def serve(config: ServeConfig) -> None:
    """Answer requests until SIGTERM or Ctrl-C; what has been accepted by then is still answered."""
    before_serving(config)
    keys = read_keys(config.api_keys)
    if not config.is_local and not keys:
        logger.warning("warning: --host %s without --api_keys: whoever reaches this machine may use it", config.host)
    model = SpeechLM.from_pretrained(config.checkpoint or Path(config.proj_dir), Parts.of(config), compute_of(config))
    model.add_states(config.state)
    web_server(Service(model, config, keys), config).run()


class _WebServer(uvicorn.Server):
    """uvicorn's, but for realtime connections, which it would cut: they end when they are told what was said."""

    def __init__(self, settings: uvicorn.Config, service: Service) -> None:
        super().__init__(settings)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and return when what is there has ended."""
        for server in self.servers:
            server.close()
        await self._service.realtime.end()
        await super().shutdown(sockets)


def web_server(service: Service, config: ServeConfig) -> uvicorn.Server:
    """What answers at the address that the flags name, once it runs."""
    settings = uvicorn.Config(
        service.app,
        host=config.host,
        port=config.port,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws=Quiet,
        ws_max_size=FRAME_BYTES,
        ws_max_queue=4,
        ws_per_message_deflate=False,
        ws_ping_interval=None,  # idle_seconds ends silent clients; a busy server would read no pong in time
        http=impatient(config.upload_seconds),
        timeout_graceful_shutdown=round(config.upload_seconds + config.request_seconds),
    )
    return _WebServer(settings, service)
