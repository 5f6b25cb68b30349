"""merge, combine, inspect and doctor as a user types them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tinylm
from tests.models.tiny import checkpoint
from veneer.adapter import Adapter, Provenance
from veneer.cli.main import run
from veneer.inject import create
from veneer.methods.lora import LoRA
from veneer.models.load import load_base


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base and two adapters of it, a and b."""
    folder = checkpoint("llama", tmp_path / "base")
    base = load_base(folder, "float32")
    for seed, name in enumerate(("a", "b")):
        g = torch.Generator().manual_seed(seed)
        fresh = create(base, LoRA(rank=2 + seed), g, provenance=Provenance(base=base.identity, base_name="tiny"))
        fresh.map_tensors(lambda t, g=g: t + 0.02 * torch.randn(t.shape, generator=g)).save(tmp_path / name)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_merge_and_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = str(place / "base"), str(place / "out")
    assert run(["merge", "--base", base, "--adapter", f"{place / 'a'}@0.5", "--out", out, "--unmergeable"]) == 0
    text = capsys.readouterr().out
    assert "of the update survived rounding" in text
    assert "KL" in text
    assert run(["merge", "--undo", out, "--out", str(place / "back")]) == 0
    original = (place / "base" / "model.safetensors").read_bytes()
    assert (place / "back" / "model.safetensors").read_bytes() == original
    capsys.readouterr()
    assert (
        run(["merge", "--base", base, "--adapter", str(place / "a"), "--out", str(place / "j"), "--json", "--no-check"])
        == 0
    )
    report = told(capsys)
    assert report["survived"] > 0.99
    assert report["check"] is None
    assert run(["merge", "--base", base, "--adapter", str(place / "a"), "--out", out]) == 1
    assert run(["merge", "--out", str(place / "x")]) == 2
    capsys.readouterr()
    four = ["merge", "--base", base, "--adapter", str(place / "a"), "--out", str(place / "four"), "--quantize"]
    assert run([*four, "nf4-dq"]) == 0
    assert "gain" in capsys.readouterr().out
    assert run([*four, "nf5"]) == 2


def test_combine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(place / "a"), str(place / "b")
    assert (
        run(["combine", "--rule", "ties", f"{a}=0.7", f"{b}=0.3", "--density", "0.5", "--out", str(place / "both")])
        == 0
    )
    text = capsys.readouterr().out
    assert "before combining" in text
    assert "exact for its rule" in text
    made = Adapter.load(place / "both")
    assert made.provenance.extra["recipe"]["options"] == {"density": 0.5}
    assert (
        run(["combine", "--rule", "svd", "--rank", "2", f"{a}=1", f"{b}=-1", "--out", str(place / "svd"), "--json"])
        == 0
    )
    report = told(capsys)
    assert report["report"]["error"] > 0
    assert report["interference"][0]["cosine"] == pytest.approx(0, abs=0.5)
    recipe = place / "r.yaml"
    recipe.write_text("rule: cat\nadapters: {one: {path: a, weight: 2.0}, two: {path: b}}\n")
    assert run(["combine", str(recipe), "--out", str(place / "cat")]) == 0
    one, two, cat = Adapter.load(a), Adapter.load(b), Adapter.load(place / "cat")
    for target in cat.targets:
        torch.testing.assert_close(cat.delta(target), 2 * one.delta(target) + two.delta(target))
    capsys.readouterr()
    assert run(["combine", f"{a}", "nowhere=1", "--out", str(place / "x")]) == 2
    message = capsys.readouterr().err
    assert "is not FOLDER=WEIGHT" in message
    assert "no folder 'nowhere'" in message
    assert run(["combine", "--rules"]) == 0
    assert "dare_ties" in capsys.readouterr().out


def test_combining_overwrites_nothing_and_ignores_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(place / "a"), str(place / "b")
    before = Adapter.load(a).digest
    assert run(["combine", f"{a}=1", f"{b}=-1", "--out", a]) != 0
    assert "already there" in capsys.readouterr().err and Adapter.load(a).digest == before
    recipe = place / "plain.yaml"
    recipe.write_text("rule: cat\nadapters: {one: {path: a, weight: 2.0}, two: {path: b}}\n")
    assert run(["combine", str(recipe), "--rank", "1", "--rule", "ties", "--out", str(place / "new")]) == 2
    assert "--rule, --rank would have no effect" in capsys.readouterr().err
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{rule: svd, options: {rank: 1, seed: 3}, adapters: {one: {path: a}, two: {path: b}}}", "seed: no option"),
        (
            "{rule: svd, rank: 2, options: {rank: 1}, adapters: {one: {path: a}, two: {path: b}}}",
            "the rank is 2, and 1",
        ),
        ("{adapters: {one: {path: a, targets: {q_proj: .nan}}, two: {path: b}}}", "finite"),
        ("{adapters: {one: {path: a, targets: {'nowhere.*': 1}}, two: {path: b}}}", "matches no target of it"),
    ],
)
def test_recipes_that_are_refused(recipe: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bad.yaml").write_text(recipe)
    assert run(["combine", str(place / "bad.yaml"), "--out", str(place / "bad")]) == 2
    assert message in capsys.readouterr().err and not (place / "bad").exists()


def test_words_of_the_command_line_are_checked_like_a_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(place / "a"), str(place / "b")
    for words in ([f"{a}=nan"], [f"{a}=1", "--others", "foo"]):
        assert run(["combine", f"{b}=1", *words, "--out", str(place / "never")]) == 2
        assert "defect" not in capsys.readouterr().err and not (place / "never").exists()
    assert run(["combine", "--rule", "svd", "--set", "rank=1", f"{a}=1", f"{b}=1", "--out", str(place / "one")]) == 0
    assert Adapter.load(place / "one").spec.rank == 1  # type: ignore[attr-defined]


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(place / "a"), "--json"]) == 0
    facts = told(capsys)
    adapter = Adapter.load(place / "a")
    assert facts["digest"] == adapter.digest
    assert facts["parameters"] == adapter.num_parameters
    first = facts["targets"][0]
    sigma = torch.linalg.svdvals(adapter.delta(first["target"]).double())
    assert first["scale"] == adapter.scale(first["target"])
    assert first["spectrum"]["frobenius"] == pytest.approx(float(sigma.norm()), rel=1e-5)
    assert first["spectrum"]["stable_rank"] == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-5)
    assert run(["inspect", str(place / "a")]) == 0
    assert "stable rank" in capsys.readouterr().out
    assert run(["inspect", str(place / "none")]) == 1


def test_doctor(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--base", str(place / "base"), str(place / "a")]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    fresh = Adapter.load(place / "a").map_tensors(torch.zeros_like)
    fresh.save(place / "dead")
    assert run(["doctor", str(place / "dead"), "--json"]) == 1
    assert told(capsys)["worst"] == "error"
    assert run(["doctor"]) == 2


def test_every_export_has_a_card(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's figures and data come along, the licence only where somebody says it, and a scaled adapter loses its figures."""
    run_folder, base = place / "run", str(place / "base")
    run_folder.mkdir()
    (place / "a").rename(run_folder / "adapter")
    (run_folder / "provenance.json").write_text(json.dumps({"data": {"train": "ab" * 32}}))
    (run_folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval_loss": 1.25, "general_loss": 2.5}) + "\n")
    a = str(run_folder / "adapter")
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")

    def export(form: str, out: str, *more: str) -> str:
        assert run(["export", "--format", form, "--base", base, "--adapter", a, "--out", str(place / out), *more]) == 0
        return str(capsys.readouterr().out)

    assert "peft/README.md" in export("peft", "peft", "--license", "Apache-2.0")
    text = (place / "peft" / "README.md").read_text()
    fields = yaml.safe_load(text.split("---")[1])
    assert fields["license"] == "apache-2.0"
    assert (fields["base_model"], fields["library_name"]) == ("tiny", "peft")
    assert fields["metrics"] == ["eval_loss", "general_loss"]
    assert "| eval_loss | 1.25 |" in text
    assert "ab" * 32 in text and Adapter.load(place / "peft").digest in text
    export("gguf", "m.gguf", "--license", "mit")
    text = (place / "m.README.md").read_text()
    assert "before the two were merged" in text and "mit (says its own card)" in text
    export("vllm", "vllm")
    text = (place / "vllm" / "README.md").read_text()
    assert "license: unknown" in text and Adapter.load(place / "run").digest in text
    assert run(["merge", "--base", base, "--adapter", f"{a}@0.5", "--out", str(place / "out"), "--no-check"]) == 0
    text = (place / "out" / "README.md").read_text()
    assert "0.5 times what was trained" in text and "eval_loss" not in text
    assert "lost to rounding" in text and "mit (says its own card)" in text
    assert (place / "out" / "README.base.md").read_text().endswith("# The base\n")
    capsys.readouterr()
    assert run(["export", "--format", "gguf", "--base", base, "--adapter", a, "--out", str(place / "m.bin")]) == 1
    assert "m.README.md is already there" in capsys.readouterr().err


def test_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, a = str(place / "base"), str(place / "a")
    assert run(["export", "--format", "gguf", "--base", base, "--adapter", a, "--out", str(place / "m.gguf")]) == 0
    assert (place / "m.gguf").read_bytes()[:4] == b"GGUF"
    assert (
        run(["export", "--format", "gguf-adapter", "--base", base, "--adapter", a, "--out", str(place / "a.gguf")]) == 0
    )
    assert run(["export", "--format", "peft", "--adapter", f"{a}@0.5", "--out", str(place / "peft")]) == 0
    half, whole = Adapter.load(place / "peft"), Adapter.load(place / "a")
    target = whole.targets[0]
    torch.testing.assert_close(2 * half.delta(target), whole.delta(target))
    assert run(["export", "--format", "vllm", "--adapter", a, "--out", str(place / "vllm")]) == 0
    assert "--max-lora-rank 8" in capsys.readouterr().out
    assert run(["export", "--for", "vllm", "--adapter", a]) == 0
    invoked = Adapter.load(a)
    invoked = replace(invoked, spec=invoked.spec.model_copy(update={"invocation": (5, 6)}))  # type: ignore[attr-defined]
    invoked.save(place / "invoked")
    assert run(["export", "--format", "vllm", "--adapter", str(place / "invoked"), "--out", str(place / "no")]) == 1
    assert "aLoRA" in capsys.readouterr().err
    assert run(["export", "--for", "sglang", "--adapter", a]) == 0
    assert run(["export", "--for", "tgi", "--adapter", a]) == 2
    assert run(["export", "--format", "ollama", "--base", base, "--adapter", a, "--out", str(place / "o")]) == 1
    assert "no tokenizer" in capsys.readouterr().err
    assert not (place / "o").exists()
    assert run(["export", "--format", "gguf", "--base", base, "--out", str(place / "m.gguf")]) == 1
    assert run(["export", "--format", "ggfu", "--out", str(place / "x")]) == 2
    assert "did you mean 'gguf'" in capsys.readouterr().err


@pytest.mark.parametrize("form", [["gguf"], ["gguf-adapter"], ["ollama", "--apart"]])
def test_an_adapter_of_another_base_is_exported_for_a_reason_only(
    form: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tinylm.folder(place / "other", hidden_size=48, intermediate_size=96, seed=9))
    made = create(load_base(other, "float32"), LoRA(rank=2), torch.Generator().manual_seed(0))
    mine = replace(made, provenance=Provenance(base="0" * 64, base_name="yet another"))
    mine.save(place / "mine")
    order = ["export", "--format", *form, "--base", other, "--adapter", str(place / "mine"), "--out", str(place / "x")]
    assert run(order) == 1
    assert "made for another base" in capsys.readouterr().err and not (place / "x").exists()
    assert run([*order, "--allow-base-mismatch", "a trial of mine"]) == 0
    cards = [*place.glob("x.README.md"), *place.glob("x/README.md")]
    assert "a trial of mine" in cards[0].read_text()
