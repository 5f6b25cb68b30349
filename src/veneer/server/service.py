"""One server's parts, joined: base, engine thread, library, keys, metrics; and from a model name to what runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.engine import Engine, Finished, Use
from veneer.engine.hot import MERGED
from veneer.errors import ConfigError, NotFound
from veneer.models.base import Base
from veneer.server.keys import Key, Keyring
from veneer.server.loop import EngineLoop
from veneer.server.metrics import Metrics, Snapshot
from veneer.server.settings import Settings
from veneer.server.shelf import Shelf


@dataclass(frozen=True)
class Asked:
    """What a request's model and adapter fields mean now.

    uses     for the engine: versions, never moving names
    names    adapter names without version, for permissions and metrics
    digests  content identities
    """

    uses: tuple[Use, ...] = ()
    names: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()

    @property
    def title(self) -> str | None:
        """One word for it: the adapter's name, "a+b", or None for the base."""
        return "+".join(self.names) or None

    @property
    def versions(self) -> str:
        """What answers, for headers and logs."""
        return ", ".join(use.name if use.scale == 1.0 else f"{use.name}*{use.scale:g}" for use in self.uses) or "base"


class Service:
    """Everything that the routes need. `names` remembers digest -> version for people to read."""

    def __init__(
        self, base: Base, engine: Engine, shelf: Shelf, keyring: Keyring, settings: Settings, metrics: Metrics
    ) -> None:
        self.base, self.engine, self.shelf = base, engine, shelf
        self.keyring, self.settings, self.metrics = keyring, settings, metrics
        self.loop = EngineLoop(engine, metrics)
        self.names: dict[str, str] = {}
        self.usage: dict[str, Counter[str]] = {}

    def asked(self, model: str, adapters: Sequence[Use], draw: float | None, key: Key) -> Asked:
        """What `model` and the `adapter` field stand for, if `key` may use it. Reads the library: not for the event loop.

        `draw` in [0, 1) gives canaries their share of the bare names; without one a bare name is its production version.
        """
        named = self.adapter_of(model)
        if named is not None and adapters:
            raise ConfigError(
                f"the model field names the adapter '{named}', and the adapter field names others",
                help=f"set model to '{self.base.name}' and list all in the adapter field",
            )
        wanted = list(adapters) if named is None else [Use(named)]
        for use in wanted:  # before anything is looked up: what is there and what isn't look alike from outside
            key.check_use(use.name.partition("@")[0])
        if not wanted:
            key.check_use(None)
        found = [self._one(use, draw, key) for use in wanted]
        for _, name, _ in found:
            key.check_use(name)
        return Asked(
            tuple(use for use, _, _ in found),
            tuple(name for _, name, _ in found),
            tuple(digest for _, _, digest in found),
        )

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a model name means, or None for the base: `base`, `base:adapter` and `adapter` are understood."""
        if model in ("", self.base.name):
            return None
        return model.removeprefix(f"{self.base.name}:")

    def _one(self, use: Use, draw: float | None, key: Key) -> tuple[Use, str, str]:
        local = self.engine.residency.local
        if use.name in local:
            found = local.resolve(use.name)
            self.names[found.digest] = use.name
            return use, use.name, found.digest
        try:
            version = self.shelf.version_of(use.name, draw)
        except ConfigError as error:
            raise NotFound(f"no model is called {use.name[:100]!r}", help=error.message) from error
        except NotFound as error:
            if "*" in key.adapters:
                raise
            # The hint names adapters that are there, and this key may not know of all of them.
            raise NotFound(error.message, help="`GET /v1/models` lists what this key may use") from error
        self.names[version.digest] = version.ref
        return Use(version.ref, use.scale), version.name, version.digest

    def count(self, asked: Asked, key: str, outcome: str, answers: Sequence[Finished]) -> None:
        """Exact totals, by key and by each adapter that answered, alone or with others."""
        adapters = dict.fromkeys(use.name for use in asked.uses) or ("base",)
        for who in (*(f"adapter {name}" for name in adapters), f"key {key}"):
            total = self.usage.setdefault(who, Counter())
            total["requests"] += 1
            total[outcome] += 1
            total["completion_tokens"] += sum(a.usage.completion for a in answers)
            total["prompt_tokens"] += sum(a.usage.prompt for a in answers if a.choice == 0)
            total["cached_tokens"] += sum(a.usage.cached for a in answers if a.choice == 0)

    def snapshot(self, stock: tuple[int, int] = (0, 0)) -> Snapshot:
        """The engine now, beside what the library holds. Call on its thread."""
        engine, slots = self.engine, self.engine.residency.slots
        while engine.residency.load_seconds:
            self.metrics.load.observe(engine.residency.load_seconds.popleft())
        states = Counter(state for key, state in slots.states().items() if not key.startswith(MERGED))
        counters = slots.counters
        return Snapshot(
            running=len(engine.scheduler.running),
            waiting=len(engine.scheduler.waiting),
            adapters={s: states[s] for s in ("available", "loading", "resident", "draining", "failed")},
            tiers={
                "library": stock,
                "memory": (states["resident"] + states["draining"], slots.charged - engine.hot.bytes),
                "merged": (int(engine.hot.state == "hot"), engine.hot.bytes),
            },
            adapter_budget=slots.budget,
            dequantised_bytes=engine.dequantised_bytes,
            sketch_bytes=engine.sketch_bytes,
            events={
                "hit": counters.hits,
                "miss": counters.misses,
                "load": counters.loads,
                "eviction": counters.evictions,
                "failure": counters.failures,
            },
            kv={"promised": engine.book.promised, "kept": engine.book.kept, "budget": engine.book.budget},
            chunk=engine.scheduler.pace.chunk,
            most_adapters=engine.limits.adapters,
            running_adapters=self._titles(s.adapter for s in engine.scheduler.running),
            waiting_adapters=self._titles(s.adapter for s in engine.scheduler.waiting)[: engine.limits.adapters],
        )

    def _titles(self, keys: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({self.names.get(key, key[:12]) for key in keys if key}))
