"""Small adapters and libraries for the tests of the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import make_url

from veneer.adapter import Adapter, Part, Provenance
from veneer.library.blobs import Blobs
from veneer.library.library import Library
from veneer.library.place import FILE, Place
from veneer.methods.lora import LoRA
from veneer.types import BaseShape, HostShape

BASE = "ab" * 32


def make(seed: int = 0, *, rank: int = 4, width: int = 16, layers: int = 2, **provenance: Any) -> Adapter:
    """A random LoRA on the q and v projections of a tiny base."""
    generator = torch.Generator().manual_seed(seed)
    targets = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(layers) for name in "qv"]
    parts = tuple(
        Part(
            "lora",
            "weight",
            target,
            {
                "A": torch.randn(rank, width, generator=generator),
                "B": torch.randn(width, rank, generator=generator),
            },
        )
        for target in targets
    )
    facts = {"base": BASE, "base_name": "tiny", **provenance}
    return Adapter(LoRA(rank=rank, targets=("q_proj", "v_proj")), parts, Provenance(**facts))


def folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """The same, saved."""
    make(seed, **changes).save(path)
    return path


def library_on(file_system: Any, root: str, database: str) -> Library:
    """A library on a file system made by a test."""
    library = Library(root if file_system.protocol[0] == "file" else f"memory://{root}#{database}")
    library._place = Place(Blobs(file_system, root), make_url(database))
    return library


def sqlite_at(root: Path) -> str:
    return f"sqlite:///{root / FILE}"


def files_under(root: Path) -> set[str]:
    """Every file of a library but the catalogue's own."""
    return {
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and not path.name.startswith(FILE)
    }


@dataclass
class FakeBase:
    """What the library asks of a base."""

    identity: str | None = BASE
    name: str = "tiny"
    width: int = 16
    layers: int = 2
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> BaseShape:
        hosts = {
            f"model.layers.{i}.self_attn.{name}_proj": HostShape("linear", self.width, self.width)
            for i in range(self.layers)
            for name in "qkvo"
        }
        return BaseShape(self.width, self.layers, 2, 2, self.width // 2, 32, hosts)

    def samples(self, target: str) -> tuple[float, ...]:
        return self.values.get(target, (1.0, -2.0, 0.5))


def refs(versions: Sequence[Any]) -> list[str]:
    return [version.ref for version in versions]
