"""Names that users type, and what they stand for.

A `Registry` is a dict with a decorator to fill it and an error that suggests; `Latest` is one that forgets. `discover` imports
every public module of a package once, so that a method, an init or a rule is one file: dropping it in is enough. `selects` is
what a selector means, wherever module paths are named. `Declared` is the base of what has keys and values: methods, and the
sections of a run file.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from veneer.errors import ConfigError

K = TypeVar("K")
T = TypeVar("T")


def did_you_mean(word: str, known: list[str]) -> str:
    """A hint for a mistyped word: the nearest known one, or all of them.

    >>> did_you_mean("lroa", ["lora", "dora", "ia3"])
    "did you mean 'lora'?"
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"


def selects(selector: str, target: str) -> bool:
    """Whether a selector means the module path `target`: its name, a dotted suffix, a glob, or re:REGEX (whole name).

    >>> selects("q_proj", "model.layers.0.q_proj"), selects("layers.0.*", "model.layers.0.q_proj"), selects("proj", "q_proj")
    (True, True, False)
    """
    if selector.startswith("re:"):
        try:
            return re.fullmatch(selector[3:], target) is not None
        except re.error as error:
            raise ConfigError(
                f"the selector '{selector}' is not a regular expression: {error}",
                help="write a name, a glob, or re:REGEX",
            ) from error
    if any(c in selector for c in "*?["):
        return fnmatch.fnmatchcase(target, selector) or fnmatch.fnmatchcase(target, f"*.{selector}")
    return target == selector or target.endswith("." + selector)


class Declared(BaseModel):
    """Unknown keys are errors, and so are infinite numbers and true where a number is meant, which Python takes for 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _takes_truth(cls.model_fields[str(field.field_name)].annotation):
            raise ValueError(f"expected another value than true or false, got {value}")
        return value


def _takes_truth(annotation: Any) -> bool:
    return annotation is bool or isinstance(annotation, bool) or any(map(_takes_truth, get_args(annotation)))


class Registry(dict[str, T], Generic[T]):
    """Name -> thing. `what` is the word for one entry in error messages."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that files its function or class under `name`. A second, different entry is an error."""

        def file(entry: T) -> T:
            if name in self and self[name] is not entry:
                raise ConfigError(f"two {self.what} entries are called '{name}'")
            self[name] = entry
            return entry

        return file

    def __missing__(self, name: str) -> T:
        raise ConfigError(f"no {self.what} is called '{name}'", help=did_you_mean(name, list(self)))


class Latest(dict[K, T], Generic[K, T]):
    """The entries that were filed last: beyond `most` the oldest goes. Safe on any thread.

    >>> known = Latest[str, int](2)
    >>> known["a"] = known["b"] = known["c"] = 1
    >>> list(known)
    ['b', 'c']
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._lock = most, Lock()

    def __setitem__(self, key: K, entry: T) -> None:
        with self._lock:
            self.pop(key, None)
            super().__setitem__(key, entry)
            while len(self) > self._most:
                del self[next(iter(self))]


def discover(package: str) -> list[str]:
    """Import every public module of `package`, in name order, and return their names. Importing twice costs nothing."""
    found = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_"))
    for name in names:
        importlib.import_module(f"{package}.{name}")
    return names
