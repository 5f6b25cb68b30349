"""What Prometheus sees. Every label has few values: adapters beyond the first so many are "other".

Exact totals of every adapter are at `/admin/usage`.

`vllm:lora_requests_info` is the gauge that gateways read to route by adapter (the inference extension's model-server
protocol): one sample, whose labels list the adapters that run and wait now.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from veneer.engine.request import Finished
from veneer.engine.scheduler import StepReport

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_FEW = (0, 1, 2, 4, 8, 16, 32, 64)
OTHER = "other"


@dataclass(frozen=True)
class Snapshot:
    """The engine at one moment, read between two steps.

    adapters  state -> how many
    tiers     library, memory, merged -> how many adapters are there, and their bytes
    events    hit, miss, load, eviction, failure -> how many so far
    kv        promised, kept, budget -> bytes
    dequantised_bytes   beside the base: a 4-bit base's dense copy
    sketch_bytes        beside the base: what finds the likeliest token without all scores
    """

    running: int
    waiting: int
    adapters: Mapping[str, int]
    tiers: Mapping[str, tuple[int, int]]
    adapter_budget: int
    dequantised_bytes: int
    sketch_bytes: int
    events: Mapping[str, int]
    kv: Mapping[str, int]
    chunk: int
    most_adapters: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]


class Metrics:
    """All counters of one server. `name_of` gives an adapter a label value."""

    def __init__(self, named: int) -> None:
        self.registry = CollectorRegistry()
        self._named, self._names = named, set[str]()
        self.requests = self._counter("veneer_requests", "Requests by adapter and outcome", "adapter", "outcome")
        self.tokens = self._counter("veneer_tokens", "Tokens by adapter and kind", "adapter", "kind")
        self.first_token = self._seconds("veneer_first_token_seconds", "From arrival to the first token")
        self.between = self._seconds("veneer_inter_token_seconds", "Between two pieces of one answer")
        self.queue = self._seconds("veneer_queue_seconds", "From arrival to a place in the batch")
        self.total = self._seconds("veneer_request_seconds", "From arrival to the end")
        self.step = self._seconds("veneer_step_seconds", "One step of the engine")
        self.load = self._seconds("veneer_adapter_load_seconds", "Reading, checking and packing one adapter")
        self.per_step = Histogram(
            "veneer_step_adapters", "Distinct adapters in a step", registry=self.registry, buckets=_FEW
        )
        self.step_tokens = self._counter("veneer_step_tokens", "Tokens computed in steps", "kind")
        self.steps = self._counter("veneer_steps", "Steps on the base and on the hot adapter's merged set", "weights")
        self._live = _Live()
        self.registry.register(self._live)

    def label(self, adapter: str | None) -> str:
        """The label value of an adapter's name: the first so many names, then "other"."""
        if adapter is None:
            return "base"
        if adapter not in self._names and len(self._names) < self._named:
            self._names.add(adapter)
        return adapter if adapter in self._names else OTHER

    def ended(self, adapter: str | None, outcome: str, answers: Iterable[Finished]) -> None:
        """A request has ended with these answers."""
        label = self.label(adapter)
        self.requests.labels(label, outcome).inc()
        for answer in answers:
            if answer.choice == 0:
                self.tokens.labels(label, "prompt").inc(answer.usage.prompt)
                self.tokens.labels(label, "cached").inc(answer.usage.cached)
            self.tokens.labels(label, "completion").inc(answer.usage.completion)
            self.queue.observe(answer.timing.queue)
            if answer.usage.completion:
                self.first_token.observe(answer.timing.first_token)
            self.total.observe(answer.timing.total)

    def stepped(self, report: StepReport) -> None:
        """The engine has made a step."""
        self.step.observe(report.seconds)
        self.steps.labels("merged" if report.merged else "base").inc()
        self.per_step.observe(report.adapters)
        self.step_tokens.labels("decode").inc(report.decoded)
        self.step_tokens.labels("prefill").inc(report.prefilled)

    def gap(self, seconds: float) -> None:
        """So long after the piece before came the next one of the same answer."""
        self.between.observe(seconds)

    def text(self, now: Snapshot) -> bytes:
        """The exposition format."""
        self._live.now = now
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def _seconds(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, registry=self.registry, buckets=_SECONDS)


class _Live(Collector):
    """Gauges of the moment when somebody asks."""

    def __init__(self) -> None:
        self.now: Snapshot | None = None

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self.now
        if now is None:
            return
        yield GaugeMetricFamily("veneer_running", "Sequences running", value=now.running)
        yield GaugeMetricFamily("veneer_waiting", "Sequences waiting", value=now.waiting)
        yield GaugeMetricFamily(
            "veneer_prefill_chunk_tokens", "Prompt tokens taken into a decode step", value=now.chunk
        )
        yield _labelled("veneer_adapters", "Adapters by state", "state", now.adapters)
        counts = {tier: count for tier, (count, _) in now.tiers.items()}
        yield _labelled(
            "veneer_tier_adapters", "Adapters on disk, packed in memory, merged into weights", "tier", counts
        )
        sizes = {tier: size for tier, (_, size) in now.tiers.items()}
        yield _labelled("veneer_tier_bytes", "Bytes of the adapters of a tier", "tier", sizes)
        yield GaugeMetricFamily(
            "veneer_adapter_budget_bytes", "Most that memory and merged may take", value=now.adapter_budget
        )
        yield GaugeMetricFamily(
            "veneer_base_dequantised_bytes",
            "Dense copy of a 4-bit base, made at the start",
            value=now.dequantised_bytes,
        )
        yield GaugeMetricFamily(
            "veneer_base_sketch_bytes", "Sketch of the head, made when greedy answers decode", value=now.sketch_bytes
        )
        yield _labelled("veneer_kv_bytes", "Memory of keys and values", "kind", now.kv)
        events = CounterMetricFamily("veneer_adapter_events", "Adapter hits, misses, loads, ...", labels=["event"])
        for event, count in now.events.items():
            events.add_metric([event], count)
        yield events
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that run and wait now, for gateways; the value is the time",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = [str(now.most_adapters), ",".join(now.running_adapters), ",".join(now.waiting_adapters)]
        lora.add_metric(names, time.time())
        yield lora


def _labelled(name: str, help: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
