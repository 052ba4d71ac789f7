"""What the server counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from traceir.items import Modality
from traceir.serve.jobs import Served
from traceir.serve.scheduler import Scheduler
from traceir.serve.security import App, Message, Receive, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counters of one server, in a registry of their own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("traceir_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.seconds = Histogram("traceir_stage_seconds", "Wall time of a stage.", ["stage"], buckets=SECONDS, registry=registry)
        self.routes = Counter("traceir_encoded", "Inputs encoded, by route.", ["role", "route"], registry=registry)
        self.truncated = Counter("traceir_truncated", "Queries that ended without <|emb|>.", registry=registry)
        about = "Tokens written for a query that reasons."
        self.tokens = Histogram("traceir_reasoning_tokens", about, buckets=TOKENS, registry=registry)
        self.cache = Counter("traceir_cache", "Encodings asked for, by whether known.", ["found"], registry=registry)
        self.waiting = Gauge("traceir_inputs_under_way", "Inputs that have come and are not encoded yet.", registry=registry)
        self.items = Gauge("traceir_items", "Items in the index.", ["modality"], registry=registry)

    def encoded(self, role: str, served: Served) -> None:
        """Counts an encoding, of a query or an item, and the time it took."""
        self.cache.labels("yes" if served.cached else "no").inc()
        if served.cached:
            return
        self.routes.labels(role, served.encoding.route).inc()
        self.seconds.labels("queue").observe(served.queue)
        self.seconds.labels("encode").observe(served.encode)
        self.truncated.inc(int(served.encoding.truncated))
        if served.encoding.tokens:
            self.tokens.observe(served.encoding.tokens)

    def count_dropped(self, dropped: Callable[[], int]) -> None:
        """Shows how many lines the audit log has lost."""
        gauge = Gauge("traceir_audit_dropped", "Lines that the audit log lost since the start.", registry=self.registry)
        gauge.set_function(dropped)

    def page(self, scheduler: Scheduler, counts: Mapping[Modality, int]) -> bytes:
        """All of it in Prometheus' text format."""
        self.waiting.set(scheduler.under_way)
        self.items.clear()
        for modality, count in counts.items():
            self.items.labels(modality).set(count)
        return generate_latest(self.registry)


class Counted:
    """Middleware, around all others: counts every answer by route and status, also those that never reach the application."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if scope["type"] == "http":
                path = getattr(scope.get("route"), "path", "unknown")
                self.metrics.requests.labels(path, str(status)).inc()
                self.metrics.seconds.labels("request").observe(time.perf_counter() - started)
