"""The server: the API of openai's audio client over one model on this machine."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi import Form as FormFields
from starlette.responses import JSONResponse, Response

from rwkv_speech.batch import BadSample
from rwkv_speech.checks import before_serving
from rwkv_speech.config import ServeConfig
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Transcript
from rwkv_speech.decoding.transcriber import Recording
from rwkv_speech.devices import compute_of
from rwkv_speech.errors import UserError
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.serving import faults
from rwkv_speech.serving.answers import answer
from rwkv_speech.serving.faults import Fault
from rwkv_speech.serving.form import Audio, Form, recording_of
from rwkv_speech.serving.guard import Guard
from rwkv_speech.serving.worker import Worker

logger = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LEAST_KEY = 16  # letters


class Service:
    """One model, its worker, and the application that asks it; `app` is what a web server runs."""

    def __init__(self, model: SpeechLM, config: ServeConfig, keys: Sequence[str] = ()) -> None:
        self._model, self._config, self._options = model, config, Options.of(config)
        self._worker = Worker(model, self._options, config.micro_bsz)
        self._created = int(time.time())
        api = FastAPI(title="rwkv_speech", lifespan=self._lifespan, openapi_url=None)
        faults.register(api)
        api.get("/health/live")(self.live)
        api.get("/health/ready")(self.ready)
        api.get("/v1/models")(self.models)
        api.get("/v1/models/{name}")(self.model)
        api.post("/v1/audio/transcriptions")(self.transcriptions)
        self.app = Guard(api, config, keys)

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
        """The transcript of a recording."""
        audio = Audio(await form.file.read(), self._config.max_audio_seconds)
        await form.file.close()
        recording = await asyncio.to_thread(recording_of, form, audio, self._model, self._options)
        found = await self._result(request, recording)
        if isinstance(found, BadSample):
            raise audio.fault(found.reason)
        return answer(form, found, self._model.tokenizer)

    async def _result(self, request: Request, recording: Recording) -> Transcript | BadSample:
        """What the worker finds; it is told to give up for a client that has gone, or when it takes too long."""
        limit = self._config.request_seconds
        future = asyncio.wrap_future(self._worker.submit(recording))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((future, gone), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if future.done() and future.exception():
                raise Fault(500, "decoding failed; the server's log says why", "server_error")
            if future.done():
                return future.result()
            if gone.done():
                raise Fault(499, "the client has gone", "client_closed_request")
            raise Fault(503, f"the recording was not transcribed within {limit:g} s; send a shorter one", "timeout")
        finally:
            gone.cancel()
            if not future.done():
                future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks for it
                self._worker.cancel(recording.key)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    if config.host not in _LOOPBACK and not keys:
        logger.warning("warning: --host %s without --api_keys: whoever reaches this machine may use it", config.host)
    model = SpeechLM.from_pretrained(config.checkpoint or config.proj_dir, Parts.of(config), compute_of(config))
    model.add_states(config.state)
    web_server(Service(model, config, keys), config).run()


def web_server(service: Service, config: ServeConfig) -> uvicorn.Server:
    """What answers at the address that the flags name, once it runs."""
    settings = uvicorn.Config(
        service.app,
        host=config.host,
        port=config.port,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=round(config.upload_seconds + config.request_seconds),
    )
    return uvicorn.Server(settings)
