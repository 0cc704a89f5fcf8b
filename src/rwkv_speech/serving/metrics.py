"""What the server has done, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts of one server, which no other one in the process shares."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ["path", "status"]
        self._requests = Counter("rwkv_speech_requests", "Answered requests.", labels, registry=self._registry)
        self._seconds = Histogram(
            "rwkv_speech_request_seconds", "From a request to the end of its answer.", ["path"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._audio = Counter("rwkv_speech_audio_seconds", "Seconds of audio that was heard.", registry=self._registry)
        self._in_flight = Gauge(
            "rwkv_speech_requests_in_flight", "Requests that are answered.", registry=self._registry
        )
        self._sessions = Gauge("rwkv_speech_sessions", "Conversations that are remembered.", registry=self._registry)

    def watch(self, in_flight: Callable[[], float]) -> None:
        """Ask this function how many requests are being answered."""
        self._in_flight.set_function(in_flight)

    def watch_sessions(self, count: Callable[[], float]) -> None:
        """Ask this function how many conversations are remembered."""
        self._sessions.set_function(count)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request to a route's path ended with this status."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def heard(self, seconds: float) -> None:
        """So much audio became text, or was answered."""
        self._audio.inc(seconds)

    def response(self) -> Response:
        """All of it, in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
