"""Each trouble is found once, by name, with its cause and a fix; and a healthy adapter has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import checkpoint
from veneer import methods
from veneer.adapter import Adapter, Part, Provenance
from veneer.diagnose import Finding, adapter_findings, base_findings, file_findings, pair_findings, worst
from veneer.errors import DataError
from veneer.inject import create
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.load import load_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(checkpoint("llama-tied-mha", tmp_path_factory.mktemp("base")), "float32")


def healthy(base: Base, size: float = 0.02, **fields: Any) -> Adapter:
    spec = LoRA(rank=4, **fields)
    g = torch.Generator().manual_seed(0)
    fresh = create(base, spec, g, provenance=Provenance(base=base.identity))
    return fresh.map_tensors(lambda t: t + size * torch.randn(t.shape, generator=g))


def edited(adapter: Adapter, index: int, **tensors: torch.Tensor) -> Adapter:
    parts = list(adapter.parts)
    parts[index] = replace(parts[index], tensors={**parts[index].tensors, **tensors})
    return replace(adapter, parts=tuple(parts))


def only(findings: Sequence[Finding], level: str, text: str) -> Finding:
    assert len(findings) == 1, findings
    assert findings[0].level == level
    assert text in findings[0].what
    assert findings[0].cause
    assert findings[0].fix
    return findings[0]


def test_a_healthy_adapter_has_no_findings(base: Base) -> None:
    adapter = healthy(base)
    assert adapter_findings(adapter) == []
    assert pair_findings(adapter, base) == []
    assert worst([]) is None


def test_non_finite_values(base: Base) -> None:
    adapter = healthy(base)
    bad = edited(adapter, 2, B=torch.full_like(adapter.parts[2].tensors["B"], torch.nan))
    assert str(adapter.parts[2].target) in only(adapter_findings(bad), "error", "not finite").what


def test_an_adapter_that_changes_nothing(base: Base) -> None:
    fresh = create(base, LoRA(rank=2), torch.Generator().manual_seed(0))
    only(adapter_findings(fresh), "error", "changes nothing")
    for kind in ("ia3", "bitfit"):
        idle = create(base, methods.parse({"kind": kind}), torch.Generator().manual_seed(0))
        only(adapter_findings(idle), "error", "changes nothing")


def test_dead_and_idle_targets(base: Base) -> None:
    adapter = healthy(base)
    zero = {n: torch.zeros_like(t) for n, t in adapter.parts[1].tensors.items()}
    only(adapter_findings(edited(adapter, 1, B=zero["B"])), "warning", f"no update in 1 of {len(adapter.parts)}")
    only(adapter_findings(edited(adapter, 1, **zero)), "error", "dead for good")


def test_scales_patterns_and_a_layer_that_ran_away(base: Base) -> None:
    only(
        adapter_findings(healthy(base, alpha=128.0, scaling="alpha/sqrt(r)")), "warning", "effective scale is large: 64"
    )
    only(adapter_findings(healthy(base, alpha=0.004)), "warning", "effective scale is small")
    adapter = healthy(base)
    typo = replace(adapter, spec=LoRA(rank=4, rank_pattern={"q_prj": 4}))
    only(adapter_findings(typo), "warning", "rank_pattern 'q_prj'")
    only(adapter_findings(edited(adapter, 3, B=1e6 * adapter.parts[3].tensors["B"])), "warning", "times the median")


def test_an_adapter_on_the_wrong_base(base: Base, tmp_path: Path) -> None:
    adapter = healthy(base)
    other = load_base(checkpoint("llama-tied-mha", tmp_path / "other", seed=9), "float32")
    samples = {t: base.samples(t) for t in adapter.targets}
    named = replace(adapter, provenance=Provenance(base=base.identity, base_samples=samples))
    only(pair_findings(named, other), "error", "another base")
    only(pair_findings(replace(adapter, provenance=Provenance()), base), "note", "unverified")
    gpt2 = load_base(checkpoint("gpt2", tmp_path / "gpt2"), "float32")
    only(pair_findings(adapter, gpt2), "error", "are not layers of")


def test_what_an_adapter_does_to_the_base(base: Base) -> None:
    only(pair_findings(healthy(base, size=2.0), base), "warning", "larger than half the weight")
    tied = healthy(base, targets=("lm_head", "q_proj"))
    only(pair_findings(tied, base), "note", "head is its embedding")
    template = replace(healthy(base), provenance=Provenance(base=base.identity, chat_template="one"))
    only(pair_findings(template, base, "two"), "warning", "another chat template")


def test_a_folder_that_cannot_be_loaded(tmp_path: Path, base: Base) -> None:
    assert file_findings(tmp_path / "none")[0] is None
    healthy(base).save(tmp_path / "a")
    assert file_findings(tmp_path / "a")[1] == []
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"half")
    adapter, findings = file_findings(tmp_path / "a")
    assert adapter is None
    assert findings[0].level == "error"


class FakeWords:
    """A tokenizer of one character a token; `<` is the end token."""

    pad_id: int | None = None
    eos_id: int | None = ord("<")
    eos_ids: tuple[int, ...] = (ord("<"),)
    vocab_size = 200

    def __init__(self, template: str | None = "chat", **changes: Any) -> None:
        self.template = template
        for name, value in changes.items():
            setattr(self, name, value)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        if self.template == "broken":
            raise DataError("the chat template refuses this conversation: no")
        end = "" if self.template == "endless" else "<"
        kept = [m for m in messages if not (self.template == "silent" and m["role"] == "user")]
        text = "".join(f"{m['role']}:{m['content']}{end}" for m in kept)
        opening = "think:" if self.template == "shifting" and add_generation_prompt else ""
        return opening + text + ("assistant:" if add_generation_prompt else "")


@pytest.mark.parametrize(
    ("words", "level", "told"),
    [
        (FakeWords(vocab_size=300), "error", "300 tokens"),
        (FakeWords(eos_ids=(), template=None), "error", "nothing ends an answer"),
        (FakeWords(pad_id=ord("<")), "note", "padding token is an end token"),
        (FakeWords("broken"), "error", "refuses"),
        (FakeWords("endless"), "warning", "no end token"),
        (FakeWords("silent"), "error", "zebra"),
        (FakeWords("shifting"), "note", "not the beginning"),
        (FakeWords(None), "note", "there is none"),
        (None, "note", "no tokenizer"),
    ],
)
def test_trouble_with_words(words: FakeWords | None, level: str, told: str) -> None:
    found = base_findings(words, 256)
    assert (level, True) in [(f.level, told in f.what) for f in found], found


def test_healthy_words_have_no_findings() -> None:
    assert base_findings(FakeWords(), 256) == []


def test_the_worst_comes_first() -> None:
    note, error = (Finding(level, "x", "x", "x", "x") for level in ("note", "error"))  # type: ignore[arg-type]
    assert worst([note, error, note]) == "error"
    assert isinstance(Part("lora", "weight", "x", {}), Part)
