"""`veneer.json`: what PEFT's two files can't say, beside them.

The method with all its fields, the parts in their order, the effective scale of each target, where the adapter came from, and its
digest. Readers of PEFT files ignore it; without it an adapter loads just as well and only knows less about itself.

The surprise: the digest is checked at load, so a folder whose parts were edited apart from each other is refused.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from veneer.adapter import Adapter, Part, Probe, Provenance
from veneer.errors import ConfigError, FormatError, VeneerError, complaints, listed
from veneer.methods import Method, parse
from veneer.types import HostKind, Site

NAME = "veneer.json"
R = TypeVar("R", bound=BaseModel)


class PartRecord(BaseModel):
    """One part, without its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    site: Site
    target: str | None
    host: HostKind


class ProbeRecord(BaseModel):
    """`Probe` as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    ids: tuple[NonNegativeInt, ...] = Field(min_length=1, max_length=1024)
    tokens: tuple[NonNegativeInt, ...] = Field(min_length=1, max_length=64)
    logits: tuple[FiniteFloat, ...]
    base: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _one_score_a_token(self) -> ProbeRecord:
        if not len(self.tokens) == len(self.logits) == len(self.base):
            raise ValueError(f"{len(self.tokens)} tokens need as many logits and base scores")
        return self


def _written(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _read(text: Any) -> Any:
    if not isinstance(text, str):
        return text  # a list: how they were written at first
    packed = base64.b64decode(text, validate=True)
    if len(packed) % 4:
        raise ValueError("expected fp32 numbers in base64")
    return struct.unpack(f"<{len(packed) // 4}f", packed)


Samples: TypeAlias = Annotated[tuple[float, ...], BeforeValidator(_read), PlainSerializer(_written)]
"""Some dozen numbers of each target: fp32, little end first, in base64. As decimals they took longer to read than the tensors."""


class ProvenanceRecord(BaseModel):
    """`Provenance` as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    base_name: str | None = None
    base_samples: dict[str, Samples] = Field(default_factory=dict)
    trained_on: str | None = None
    data: str | None = None
    parents: tuple[str, ...] = ()
    chat_template: str | None = None
    probe: ProbeRecord | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    def value(self) -> Provenance:
        told = {name: getattr(self, name) for name in ProvenanceRecord.model_fields}
        return Provenance(**{**told, "probe": None if self.probe is None else Probe(**dict(self.probe))})


class Stamp(BaseModel):
    """The fields that tell an adapter from others of its form (`form.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provenance: ProvenanceRecord
    digest: str


class Sidecar(BaseModel):
    """The whole file. `layout` "peft": the tensors are in PEFT's names; "veneer": PEFT has no name for this method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    layout: Literal["peft", "veneer"]
    kind: str
    spec: dict[str, Any]
    parts: tuple[PartRecord, ...]
    scales: dict[str, float]
    provenance: ProvenanceRecord
    digest: str

    def method(self) -> Method:
        """The method that the file declares."""
        try:
            return parse({"kind": self.kind, **self.spec})
        except (VeneerError, ValidationError) as error:
            raise FormatError(
                f"{NAME} describes a method that this version does not know: {error}", help="update veneer"
            ) from error


def scales(adapter: Adapter) -> dict[str, float]:
    """The effective scale of every target that has one."""
    own = (p for p in adapter.parts if p.kind == adapter.spec.kind and p.target is not None and "A" in p.tensors)
    return {p.target: adapter.spec.scale(p.target, p.tensors["A"].shape[0]) for p in own if p.target is not None}


def describe(adapter: Adapter, layout: Literal["peft", "veneer"]) -> Sidecar:
    """The sidecar of `adapter`."""
    return Sidecar(
        layout=layout,
        kind=adapter.spec.kind,
        spec=adapter.spec.model_dump(mode="json"),
        parts=tuple(PartRecord(kind=p.kind, site=p.site, target=p.target, host=p.host) for p in adapter.parts),
        scales=scales(adapter),
        provenance=ProvenanceRecord(**asdict(adapter.provenance)),
        digest=adapter.digest,
    )


def render(sidecar: Sidecar) -> str:
    try:
        return json.dumps(sidecar.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ConfigError(f"the adapter's description holds a number that JSON has no word for: {error}") from error


def read(fields: dict[str, Any]) -> Sidecar:
    """Check the fields of a `veneer.json`."""
    return _validated(Sidecar, fields)


def read_stamp(fields: dict[str, Any]) -> Stamp:
    """Check those that tell an adapter from others of its form; the others are known to be right."""
    return _validated(Stamp, {name: fields[name] for name in Stamp.model_fields if name in fields})


def shared(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that all adapters of a form have in common."""
    return {name: value for name, value in fields.items() if name not in Stamp.model_fields}


def _validated(record: type[R], fields: dict[str, Any]) -> R:
    try:
        return record.model_validate(fields)
    except ValidationError as error:
        problems = complaints(error.errors())
        raise FormatError(
            f"{NAME} is not as expected:\n{listed(problems)}", help="update veneer, or delete it"
        ) from error


def restore(sidecar: Sidecar, parts: tuple[Part, ...], digest: str | None = None) -> Adapter:
    """The adapter of `parts` as the sidecar describes it; every difference is one line of one error.

    digest  the adapter's, where it is known already
    """
    adapter = Adapter(sidecar.method(), _in_order(sidecar, parts), sidecar.provenance.value())
    if digest is not None:
        adapter = adapter.known_as(digest)
    found = scales(adapter)
    problems = [
        f"the scale at '{target}' is {found.get(target)} by its fields, but {scale} was written down"
        for target, scale in sidecar.scales.items()
        if found.get(target) != scale
    ]
    problems += differing(adapter, sidecar)
    if problems:
        raise apart(problems)
    return adapter


def differing(adapter: Adapter, described: Sidecar | Stamp) -> list[str]:
    """What is wrong where the adapter is not the one that was described."""
    same = adapter.digest == described.digest
    return [] if same else ["tensors or fields are not those that were saved: the digest differs"]


def apart(problems: Sequence[str]) -> FormatError:
    return FormatError(
        f"the adapter's files do not belong together:\n{listed(problems)}",
        help=f"if they were changed on purpose, delete {NAME}",
    )


def _in_order(sidecar: Sidecar, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    def key(part: Part | PartRecord) -> tuple[str, str]:
        return part.kind, part.target or ""

    by_key = {key(part): part for part in parts}
    wanted = {key(record): record for record in sidecar.parts}
    problems = [f"the {kind} part at '{target}' is missing" for kind, target in wanted.keys() - by_key.keys()]
    problems += [f"a {kind} part at '{target}' is not expected" for kind, target in by_key.keys() - wanted.keys()]
    if problems:
        raise FormatError(
            f"the tensors are not those that {NAME} lists:\n{listed(sorted(problems))}",
            help=f"fetch the adapter again, or delete {NAME} if they were changed on purpose",
        )
    ordered = []
    for at, record in wanted.items():
        part = by_key[at]
        ordered.append(Part(part.kind, record.site, part.target, part.tensors, record.host))
    return tuple(ordered)
