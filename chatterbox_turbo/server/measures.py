"""What Prometheus reads: requests, the queue, how soon speech is heard, and how fast it is made."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 4, 6, 10, 15, 25, 40, 60, 120)
FACTORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)
PREFIX = "chatterbox_turbo"


class Measures:
    """Of one server; ``waiting``, ``in_flight``: how many requests there are now."""

    def __init__(self, waiting: Callable[[], int], in_flight: Callable[[], int]):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.responses = Counter(
            "responses", "HTTP responses by route and status.", ("route", "status"), PREFIX, registry=registry
        )
        self._ended = Counter(
            "speech_requests",
            "Requests for speech that were taken on, by how they ended: done, refused, failed, cancelled.",
            ("outcome",),
            PREFIX,
            registry=registry,
        )
        for outcome in ("done", "refused", "failed", "cancelled"):
            self._ended.labels(outcome)
        self.first_audio = Histogram(
            "first_audio_seconds",
            "From the arrival of a request to its first block of samples; without stream, to all of them.",
            ("stream",),
            PREFIX,
            registry=registry,
            buckets=SECONDS,
        )
        self._factor = Histogram(
            "real_time_factor",
            "Seconds from the end of queueing to the last sample, for a second of audio.",
            (),
            PREFIX,
            registry=registry,
            buckets=FACTORS,
        )
        self.queued = Histogram(
            "queue_seconds", "From arrival to the end of queueing.", (), PREFIX, registry=registry, buckets=SECONDS
        )
        self.audio = Counter("audio_seconds", "Seconds of speech that were made.", (), PREFIX, registry=registry)
        self.tokens = Counter("speech_tokens", "Speech tokens that were spoken.", (), PREFIX, registry=registry)
        for name, what, function in (
            ("waiting_requests", "Requests in the queue.", waiting),
            ("in_flight_requests", "Requests that share T3's batch.", in_flight),
        ):
            Gauge(name, what, (), PREFIX, registry=registry).set_function(function)

    def ended(self, outcome: str, worked: float, seconds: float) -> None:
        """A request is over; ``worked``: seconds since it left the queue, ``seconds``: of audio."""
        self._ended.labels(outcome).inc()
        if outcome == "done" and seconds:
            self._factor.observe(worked / seconds)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
