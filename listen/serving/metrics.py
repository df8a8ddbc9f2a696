"""Prometheus metrics of the server."""

from __future__ import annotations

from ..data.extras import extra

with extra("serve"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common = {"registry": self.registry}
        self.requests = Counter("listen_requests", "Requests by path and HTTP status", ["path", "status"], **common)
        self.under_way = Gauge("listen_requests_under_way", "Requests that are being answered", **common)
        self.waiting = Gauge("listen_requests_waiting", "Requests that wait for the next batch", **common)
        self.batch = Histogram("listen_batch_size", "Requests in one batch", buckets=_SIZES, **common)
        self.first_token = Histogram(
            "listen_first_token_seconds", "From a complete request to the first text", buckets=_SECONDS, **common
        )
        self.duration = Histogram(
            "listen_answer_seconds", "From a complete request to the end of its answer", buckets=_SECONDS, **common
        )
        self.tokens = Counter("listen_tokens", "Tokens of finished answers", ["model", "kind"], **common)
        self.audio = Counter("listen_audio_seconds", "Seconds of decoded audio", **common)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


__all__ = ["Metrics"]
