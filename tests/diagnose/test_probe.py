"""A saved adapter knows what it said; whoever loads it finds out whether it still does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.small import ids, lora, small_base
from tests.engine.test_dense import quantised
from tests.engine.test_engine import METHODS, engine, shaken
from veneer.adapter import Adapter, Probe
from veneer.diagnose import check_probe, drift, probe_findings, probed
from veneer.engine import Request
from veneer.errors import FormatError
from veneer.methods import folded
from veneer.models.base import Base


def grown(adapter: Adapter, factor: float) -> Adapter:
    """The adapter as a reader with another scale rule would have it: stronger, under the old probe."""
    stronger = adapter.scaled(factor)
    probe = adapter.provenance.probe
    assert probe is not None
    moved = replace(probe, digest=stronger.digest)
    return replace(stronger, provenance=replace(stronger.provenance, probe=moved))


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_says_again_what_it_said(kind: str, tmp_path: Path) -> None:
    base = small_base()
    adapter = probed(folded(shaken(base, kind)), base)
    probe = adapter.provenance.probe
    assert probe is not None and probe.logits != probe.base, "the text is one where the adapter makes a difference"
    adapter.save(tmp_path / "adapter")
    again = Adapter.load(tmp_path / "adapter")
    assert again.provenance.probe == probe
    assert drift(again, base) == 0.0
    running = engine(base)
    running.add("a", again)
    running.close()


def test_a_scale_by_another_rule_is_refused() -> None:
    base = small_base()
    adapter = probed(lora(base, 1), base)
    wrong = grown(adapter, 4.0)
    moved = drift(wrong, base)
    assert moved is not None and moved > 0.5
    with pytest.raises(FormatError, match="does not say what it said when it was saved"):
        check_probe(wrong, base)
    (finding,) = probe_findings(wrong, base)
    assert finding.level == "error"
    running = engine(base)
    with pytest.raises(FormatError, match="does not say"):
        running.add("a", wrong)
    running.add("a", wrong, allow_base_mismatch="we know")
    running.close()


def test_a_loaded_adapter_that_says_something_else_fails_alone() -> None:
    base = small_base()

    class Source:
        def resolve(self, name: str) -> object:
            return found[name]

    good, bad = probed(lora(base, 1), base), grown(probed(lora(base, 2), base), 4.0)
    from veneer.engine.source import Found

    found = {n: Found(n, a.digest, 1000, lambda a=a: a) for n, a in (("good", good), ("bad", bad))}  # type: ignore[misc]
    running = engine(base, source=Source())
    answer = running.complete([Request(ids(0, 6), adapter="good", max_tokens=4)])
    assert len(answer[0][0].tokens) == 4
    with pytest.raises(FormatError, match="does not say"):
        running.complete([Request(ids(0, 6), adapter="bad", max_tokens=4)])
    running.close()


@pytest.mark.parametrize(("trained_on", "asked"), [("bfloat16", 1), ("bfloat16, nf4", 3), (None, 3)])
def test_on_the_precision_it_was_trained_on_one_of_a_form_speaks_for_all(
    trained_on: str | None, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.engine import residency
    from veneer.engine.source import Found

    base = small_base(dtype=torch.bfloat16)
    plain = [lora(base, seed) for seed in range(4)]
    told = [replace(a, provenance=replace(a.provenance, trained_on=trained_on)) for a in plain]
    # the first has kept nothing that it said, so it speaks for none
    adapters = dict(enumerate([told[0], *(probed(a, base) for a in told[1:])]))

    class Source:
        def resolve(self, name: str) -> Found:
            adapter = adapters[int(name)]
            return Found(name, adapter.digest, 1000, lambda: adapter)

    calls = []

    def counted(adapter: Adapter, *rest: Any) -> bool:
        calls.append(adapter.digest)
        return check_probe(adapter, *rest)

    monkeypatch.setattr(residency, "check_probe", counted)
    running = engine(base, source=Source())
    for _ in range(2):
        for name in adapters:
            running.complete([Request(ids(0, 6), adapter=str(name), max_tokens=2)])
            running.unload(adapters[name].digest)
    running.close()
    assert len(calls) == 1 + asked


def test_what_is_made_from_an_adapter_is_not_held_to_its_words() -> None:
    base = small_base()
    adapter = probed(lora(base, 1), base)
    assert drift(adapter.scaled(0.5), base) is None
    check_probe(adapter.scaled(0.5), base)
    assert drift(lora(base, 1), base) is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_precision_of_the_base_is_no_other_adapter(kind: str, dtype: torch.dtype) -> None:
    plain = quantised_twin(dtype)
    for seed in range(4):
        adapter = probed(lora(plain, seed), plain)
        moved = drift(adapter, quantised(kind, dtype))
        assert moved is not None and moved < 0.5, (seed, moved)


def quantised_twin(dtype: torch.dtype) -> Base:
    return small_base(dtype=dtype, hidden_size=64, intermediate_size=64)


def test_a_probe_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    base = small_base()
    probed(lora(base, 1), base).save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "veneer.json"
    fields = json.loads(file.read_text())
    for name, value in (("logits", [1.0]), ("ids", []), ("tokens", [-1] * 8), ("logits", ["x"] * 8)):
        changed = json.loads(json.dumps(fields))
        changed["provenance"]["probe"][name] = value
        file.write_text(json.dumps(changed))
        with pytest.raises(FormatError, match=r"veneer\.json"):
            Adapter.load(tmp_path / "adapter")


def test_tokens_of_another_vocabulary_are_not_asked_for() -> None:
    base = small_base()
    adapter = lora(base, 1)
    probe = Probe(adapter.digest, (100_000,), (1,), (0.0,), (0.0,))
    strange = replace(adapter, provenance=replace(adapter.provenance, probe=probe))
    assert drift(strange, base) is None
