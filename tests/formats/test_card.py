"""The model card: what is known, in words that hubs read, and `unknown` for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from veneer.adapter import Adapter, Part, Provenance
from veneer.formats.card import Story, card, licence_in
from veneer.methods.lora import LoRA


def make(**provenance: object) -> Adapter:
    part = Part("lora", "weight", "model.layers.0.self_attn.q_proj", {"A": torch.ones(2, 8), "B": torch.ones(8, 2)})
    return Adapter(LoRA(rank=2, targets=("q_proj",)), (part,), Provenance(**provenance))  # type: ignore[arg-type]


def front_matter(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    found: dict[str, object] = yaml.safe_load(text[4:].split("\n---\n", 1)[0])
    return found


def test_nothing_is_invented() -> None:
    adapter = make()
    text = card(adapter, Story())
    fields = front_matter(text)
    assert fields == {"library_name": "peft", "license": "unknown", "tags": ["veneer", "lora"]}
    for section in ("Base", "Data", "Metrics", "Licence"):
        assert "unknown" in text.split(f"## {section}\n")[1].split("## ")[0], section
    assert "no other adapter is recorded" in text
    assert adapter.digest in text


def test_everything_that_is_known_is_there() -> None:
    parent = "cd" * 32
    adapter = make(
        base="ab" * 32,
        base_name="org/base",
        data="ef" * 32,
        trained_on="bfloat16",
        parents=(parent,),
        extra={"combination": {"rule": "ties", "error": 0.25}},
    )
    story = Story("tickets", {"eval_loss": 1.5}, licence="MIT", base_licence=("Apache-2.0", "its own card"))
    text = card(adapter, story, "merged")
    fields = front_matter(text)
    assert fields["base_model"] == "org/base"
    assert fields["base_model_relation"] == "finetune"
    assert (fields["library_name"], fields["license"], fields["metrics"]) == ("transformers", "mit", ["eval_loss"])
    for told in ("# tickets", "ab" * 32, "ef" * 32, parent, "| eval_loss | 1.5 |", "Apache-2.0 (says its own card)"):
        assert told in text, told
    assert "| combined by | ties, relative error 0.25 |" in text
    assert "| trained on | bfloat16 |" in text


def test_a_strangers_words_stay_in_their_cells() -> None:
    text = card(make(base_name="x\n---\n# Owned | <script>"), Story("a | b\n## c"))
    assert front_matter(text)["base_model"] == "x\n---\n# Owned | <script>"
    assert "\n# Owned" not in text.split("# a")[1]
    assert "<script>" not in text.split("# a")[1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: apache-2.0\n---\nx", ("apache-2.0", "its own card")),
        ("---\nlicense: [1, 2]\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("# no front matter\nlicense: mit", None),
        ("---\n{{{\n---\n", None),
        ("---\n- license\n---\n", None),
    ],
)
def test_the_licence_of_a_base_is_read_from_its_card(tmp_path: Path, text: str, found: tuple[str, str] | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_in(tmp_path) == found
    assert licence_in(tmp_path / "nowhere") is None
    assert licence_in(None) is None
