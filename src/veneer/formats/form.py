"""Adapter folders that differ in numbers alone: the second is read at a glance.

What the names, the sizes and the config of a folder mean takes long to find out and does not depend on a number in it. So the
first folder of a form is understood and checked in full; another one with the same header, config and description gets its own
numbers, provenance and digest in the same places. Anything else about it that differs makes it another form.

The surprise: only adapters whose every tensor is one of the file's, as it stands there, have a form. A method that decodes its
tensors, or a part whose meaning hangs on a value, is understood anew each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.adapter import Adapter, Part, Provenance, Spec
from veneer.methods import METHODS
from veneer.types import HostKind, Site

MOST = 64
"""Forms that are remembered."""


@dataclass(frozen=True, eq=False)
class Form:
    """What folders of one form mean.

    told        the fields of `veneer.json` that they share, or None where they have none
    places      for each part its kind, site, target and host, and which of the file's tensors are its own
    provenance  of a folder without `veneer.json`
    """

    told: Mapping[str, Any] | None
    spec: Spec
    places: tuple[tuple[str, Site, str | None, HostKind, tuple[tuple[str, str], ...]], ...]
    provenance: Provenance

    def filled(self, tensors: Mapping[str, Tensor], provenance: Provenance) -> Adapter:
        """The adapter of this form with these numbers."""
        parts = [
            Part(kind, site, target, {own: tensors[name] for own, name in names}, host)
            for kind, site, target, host, names in self.places
        ]
        return Adapter(self.spec, tuple(parts), provenance)


def form_of(adapter: Adapter, tensors: Mapping[str, Tensor], told: Mapping[str, Any] | None) -> Form | None:
    """The form of an adapter that was read from `tensors`, or None where it hangs on a value."""
    peft = METHODS[adapter.spec.kind].peft
    if peft is not None and (peft.decode is not None or peft.parse is not None):
        return None
    names = {id(tensor): name for name, tensor in tensors.items()}
    places = []
    for part in adapter.parts:
        own = tuple((name, names.get(id(tensor), "")) for name, tensor in part.tensors.items())
        if part.kind != adapter.spec.kind or not all(name for _, name in own):
            return None
        places.append((part.kind, part.site, part.target, part.host, own))
    return Form(told, adapter.spec, tuple(places), adapter.provenance)
