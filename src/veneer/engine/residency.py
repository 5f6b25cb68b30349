"""Adapters on their way into memory and out: names, slots and the loading thread, joined.

Everything but `resolve` belongs to the thread that steps. A loaded adapter becomes visible in `publish`, between two steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable

from veneer.adapter import Adapter
from veneer.base.identity import compare
from veneer.diagnose import check_probe
from veneer.engine.batch import Resident, prepare
from veneer.engine.loader import Loader
from veneer.engine.mould import MOST, Moulds
from veneer.engine.slots import Slots, State
from veneer.engine.source import AdapterSource, Found, Local, Recipe
from veneer.models.base import Base
from veneer.registry import Latest


class Residency:
    """Which adapters are in memory.

    local         adapters that the program holds itself; looked at first
    source        where other names are looked up
    on_loaded     called on the loading thread when a load ends, so that whoever sleeps can wake up
    load_seconds  how long the latest loads took, to be read and cleared by whoever measures
    """

    def __init__(self, base: Base, source: AdapterSource | None, budget: int) -> None:
        self.local = Local()
        self.slots: Slots[Resident] = Slots(budget)
        self.load_seconds: deque[float] = deque(maxlen=1024)
        self.on_loaded: Callable[[], None] | None = None
        self._base, self._source = base, source
        self._loader: Loader[Resident] = Loader()
        self._moulds = Moulds(base)
        self._asked: set[str] = set()
        self._sound: Latest[Hashable, None] = Latest(MOST)

    def resolve(self, name: str) -> Found:
        """What an adapter name stands for now, or NotFound. Safe on any thread."""
        if name in self.local or self._source is None:
            return self.local.resolve(name)
        return self._source.resolve(name)

    def add(self, name: str, adapter: Adapter, now: float, *, replace: bool, pin: bool, allow: str | None) -> str:
        """Check and pack `adapter` here and now, and file it under `name`; its digest."""
        compare(adapter, self._base, allow=allow)
        resident = prepare([(adapter, 1.0)], self._base)
        if allow is None:
            check_probe(adapter, self._base, resident.bank)
        found = self.local.add(name, adapter, replace=replace)
        self.slots.know(found.digest, resident.bytes)
        before = self.slots.slot(found.digest).state
        if before != "loading" and self.slots.want(found.digest, now) == "loading":
            self.slots.loaded(found.digest, resident, resident.bytes, now)
        if pin:
            self.slots.pin(found.digest)
        return found.digest

    def want(self, recipe: Recipe, now: float, sparing: Container[str] = ()) -> State:
        """The state of a recipe's slot; the load is started by the call that asks first. Nothing of `sparing` goes for it."""
        before = self.slots.know(recipe.key, recipe.bytes, recipe.summed).state
        state = self.slots.want(recipe.key, now, sparing)
        if state == "loading" and before != "loading":
            self._loader.start(recipe.key, lambda: self._load(recipe), self.on_loaded)
        return state

    def publish(self, now: float) -> None:
        """Adapters whose loading has ended become resident, or failed."""
        for loaded in self._loader.finished():
            if loaded.result is None:
                self.slots.failed(loaded.key, loaded.error, now)
            elif self.slots.loaded(loaded.key, loaded.result, loaded.result.bytes, now):
                self.load_seconds.append(loaded.seconds)

    def payload(self, key: str) -> Resident:
        """The packed form of a resident or draining adapter."""
        payload = self.slots.slot(key).payload
        assert payload is not None
        return payload

    def unload(self, digest: str) -> int:
        """Free an adapter, and sums that hold it, once nobody uses them; bytes freed at once."""
        return self.slots.drain(digest)

    @property
    def loading(self) -> int:
        return len(self._loader)

    def wait(self, timeout: float | None) -> None:
        """Until some load ends."""
        self._loader.wait(timeout)

    def close(self) -> None:
        self._loader.close()

    def _load(self, recipe: Recipe) -> Resident:
        if len(recipe.parts) == 1 and recipe.parts[0][1] == 1.0:
            return self._load_one(recipe.parts[0][0])
        parts = [(found.load(), factor) for found, factor in recipe.parts]
        for (adapter, _), (found, _) in zip(parts, recipe.parts, strict=True):
            compare(adapter, self._base, allow=found.allow)
        return prepare(parts, self._base)

    def _load_one(self, found: Found) -> Resident:
        adapter = found.load()
        resident = self._moulds.prepared(adapter, allow=found.allow)
        if found.allow is None:
            self._ask(adapter, resident)
        return resident

    def _ask(self, adapter: Adapter, resident: Resident) -> None:
        """Refuse an adapter that says something else than when it was saved.

        It takes longer than the load, so it is done once. On the precision that an adapter was trained on, what can be wrong is
        what its form decides, scales and kernels: there one of a form speaks for all. On another one each is asked.
        """
        is_its_own = adapter.provenance.trained_on == self._base.precision
        if adapter.digest in self._asked or (is_its_own and adapter.form in self._sound):
            return
        told = check_probe(adapter, self._base, resident.bank)
        if told and is_its_own:
            self._sound[adapter.form] = None
        else:
            self._asked.add(adapter.digest)
