"""A folder of a form that was read before gives what it would give alone, and everything wrong with it is still found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.laws.world import fresh, method, stirred, world
from veneer import formats
from veneer.adapter import Adapter, Provenance
from veneer.errors import FormatError
from veneer.formats.form import MOST, Form
from veneer.methods import METHODS, folded, load_all
from veneer.registry import Latest

TENSORS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "veneer.json"
KINDS = sorted(load_all())
Known = Latest[tuple[bytes, bytes], Form]


@pytest.fixture(autouse=True)
def forms(monkeypatch: pytest.MonkeyPatch) -> Known:
    """No form is known at the beginning of a test."""
    known = Known(MOST)
    monkeypatch.setattr(formats, "_FORMS", known)
    return known


def folder_of(kind: str, seed: int, at: Path, **fields: object) -> Path:
    made = folded(fresh(method(kind, **fields), world()))
    generator = torch.Generator().manual_seed(seed)

    def noisy(t: torch.Tensor) -> torch.Tensor:
        return t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t

    origin = Provenance(base=f"{seed:064x}", base_name="tiny", data=f"rows {seed}", extra={"seed": seed})
    replace(stirred(made).map_tensors(noisy), provenance=origin).save(at)
    return at


def same(one: Adapter, other: Adapter) -> None:
    assert one.digest == other.digest and one.spec == other.spec and one.provenance == other.provenance
    assert one.form == other.form
    for mine, theirs in zip(one.parts, other.parts, strict=True):
        assert all(torch.equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors)


@pytest.mark.parametrize(
    "kind, described",
    [*((kind, True) for kind in KINDS), *((kind, False) for kind in KINDS if METHODS[kind].peft is not None)],
)
def test_the_second_of_a_form_is_what_it_is_alone(
    kind: str, described: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (folder_of(kind, seed, tmp_path / str(seed)) for seed in (1, 2))
    if not described:
        for folder in (one, two):
            (folder / OURS).unlink()
    alone = formats.load(two)
    monkeypatch.setattr(formats, "_FORMS", Known(MOST))
    first = formats.load(one)
    for mapped in (False, True):
        same(formats.load(two, mapped=mapped), alone)
    assert first.digest != alone.digest


def test_a_form_is_understood_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [folder_of("lora", seed, tmp_path / str(seed)) for seed in range(3)]
    asked: list[str] = []
    known, usual = Known(MOST), formats.from_peft
    monkeypatch.setattr(formats, "_FORMS", known)
    monkeypatch.setattr(formats, "from_peft", lambda *a: (asked.append(a[2]), usual(*a))[1])
    for folder in folders:
        formats.load(folder)
    assert asked == [str(folders[0])]


@pytest.mark.parametrize("key, value", [("lora_alpha", 9), ("use_rslora", True), ("target_modules", ["q_proj"])])
def test_another_config_is_another_form(key: str, value: object, tmp_path: Path) -> None:
    one, two = (folder_of("lora", seed, tmp_path / str(seed)) for seed in (1, 2))
    formats.load(one)
    config = json.loads((two / CONFIG).read_text())
    (two / CONFIG).write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError):
        formats.load(two)
    if key != "target_modules":
        (two / OURS).unlink()
        (one / OURS).unlink()
        target = formats.load(one).targets[0]
        assert formats.load(two).scale(target) != formats.load(one).scale(target)


def _spoil_number(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _described(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / OURS).read_text())
        (folder / OURS).write_text(json.dumps({**fields, **changes}))

    return change


def _undated(folder: Path) -> None:
    fields = json.loads((folder / OURS).read_text())
    del fields["digest"]
    (folder / OURS).write_text(json.dumps(fields))


def _short(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-2])


@pytest.mark.parametrize(
    "spoil, told",
    [
        (_spoil_number, "the digest differs"),
        (_not_finite, "not finite"),
        (_described(digest="0" * 64), "the digest differs"),
        (_described(provenance={"base": 3}), "provenance.base"),
        (_described(spec={"rank": 99}), "the scale at"),
        (_described(surprise=1), "surprise"),
        (_undated, "digest"),
        (_short, "the tensors end at byte"),
    ],
    ids=["number", "nan", "digest", "provenance", "spec", "stranger", "missing", "cut"],
)
def test_what_is_wrong_with_the_second_is_found(spoil: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    one, two = (folder_of("lora", seed, tmp_path / str(seed)) for seed in (1, 2))
    formats.load(one)
    formats.load(two)
    spoil(two)
    with pytest.raises(FormatError, match=told):
        formats.load(two)


def test_a_warning_is_repeated_for_every_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in (1, 2):
        folder = folder_of("lora", seed, tmp_path / str(seed))
        (folder / OURS).unlink()
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "of_tomorrow": 1}))
        caplog.clear()
        formats.load(folder)
        assert str(folder) in caplog.text and "of_tomorrow" in caplog.text


def test_only_so_many_forms_are_kept(forms: Known) -> None:
    adapter = fresh(method("lora"), world())
    for number in range(MOST + 3):
        forms[bytes([number]), b""] = Form(None, adapter.spec, (), Provenance())
    assert list(forms) == [(bytes([number]), b"") for number in range(3, MOST + 3)]
