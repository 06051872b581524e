"""What Prometheus reads at /metrics."""

import prometheus_client as prometheus

from m1jax.serve.backend import Backend

prometheus.disable_created_metrics()

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, backend: Backend):
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "m1jax_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = prometheus.Counter("m1jax_prompt_tokens", "Tokens read.", registry=self.registry)
        self.completion_tokens = prometheus.Counter(
            "m1jax_completion_tokens", "Tokens written.", registry=self.registry
        )
        self.first_token = prometheus.Histogram(
            "m1jax_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=self.registry
        )
        self.reply = prometheus.Histogram(
            "m1jax_reply_seconds", "From a request to the end of its reply.", buckets=_SECONDS, registry=self.registry
        )
        for name, documentation, read in (
            ("m1jax_running", "Replies that the engine writes now.", lambda: backend.running),
            ("m1jax_waiting", "Replies that wait for the engine.", lambda: backend.waiting),
            ("m1jax_prefilled_tokens", "Tokens of prompts that were computed.", lambda: backend.counts.prefilled),
            ("m1jax_reused_tokens", "Tokens of prompts that a kept prefix spared.", lambda: backend.counts.reused),
            ("m1jax_preempted", "Replies that had to give their place up.", lambda: backend.counts.preempted),
            ("m1jax_failed_steps", "Steps of the engine that failed.", lambda: backend.failures),
        ):
            prometheus.Gauge(name, documentation, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return prometheus.generate_latest(self.registry)


CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
