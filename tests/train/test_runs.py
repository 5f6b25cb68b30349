"""Runs end to end on a tiny model: exactness under factoring, resume, seeds, and everything that stops a run."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tinylm
from veneer.adapter import Adapter
from veneer.errors import ConfigError, Conflict, ResourceError, TrainingError, VeneerError
from veneer.evaluate import RowLosses
from veneer.methods import Method
from veneer.methods.bottleneck import Bottleneck
from veneer.methods.lora import LoRA
from veneer.methods.vera import VeRA
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.train import Finished, Preflight, Saved, Step, train
from veneer.train.api import read_task
from veneer.train.config import Resolved, RunConfig
from veneer.train.run import run_task

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "tokens_per_step": 200,
    "tokens_per_pass": 100,
    "lr": 1e-2,
    "eval_every": 3,
    "save_every": 4,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tinylm.folder(folder / "base")
    tinylm.chat_rows(folder / "train.jsonl", 30)
    tinylm.chat_rows(folder / "eval.jsonl", 8, start=100)
    tinylm.chat_rows(folder / "general.jsonl", 8, start=300)
    return folder


@pytest.fixture(scope="module")
def base(files: Path) -> Base:
    return load_base(str(files / "base"), dtype="float32")


def run(base: Base, files: Path, out: Path, method: Any = None, resume: bool = False, **settings: Any) -> list[Any]:
    """The events of one run."""
    return list(running(base, files, out, method, resume, **settings))


def running(
    base: Base, files: Path, out: Path, method: Any = None, resume: bool = False, **settings: Any
) -> Iterator[Any]:
    """The same as they come."""
    spec = method or LoRA(rank=4, alpha=8)
    config = RunConfig(
        base=base.name,
        data={"train": files / "train.jsonl", "eval": files / "eval.jsonl", "general": files / "general.jsonl"},
        method={"kind": spec.kind} | spec.model_dump(mode="json"),
        train=SETTINGS | settings,
        out=out,
    )
    task = read_task(base, Resolved(config, {}))
    return run_task(base, task, out, resume=resume)


def losses(events: list[Any]) -> list[float]:
    return [e.loss for e in events if isinstance(e, Step)]


def tensors(adapter: Adapter) -> list[torch.Tensor]:
    return [t for part in adapter.parts for _, t in sorted(part.tensors.items())]


def test_a_run_learns_and_leaves_everything_behind(base: Base, files: Path, tmp_path: Path) -> None:
    events = run(base, files, tmp_path / "run")
    assert losses(events)[-1] < losses(events)[0]
    assert isinstance(events[0], Preflight) and isinstance(events[-1], Finished)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "label_tokens", "seconds", "tokens_per_second", "peak_bytes"}
    assert all(keys <= set(line) for line in lines)
    assert lines[2]["eval_loss"] is not None and lines[2]["general_loss"] is not None
    for name in ("adapter", "last", "checkpoint", "provenance.json", "config.yaml"):
        assert (tmp_path / "run" / name).exists(), name
    adapter = Adapter.load(tmp_path / "run/adapter")
    assert adapter.provenance.base == base.identity and adapter.provenance.base_samples


def test_the_step_does_not_depend_on_its_micro_batches(base: Base, files: Path, tmp_path: Path) -> None:
    runs = [run(base, files, tmp_path / str(n), tokens_per_pass=n) for n in (30, 100, 200)]
    passes = [e.tokens_per_pass for r in runs for e in r if isinstance(e, Preflight)]
    assert passes == [30, 100, 200]
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_recompute_changes_no_bit(base: Base, files: Path, tmp_path: Path) -> None:
    plain = run(base, files, tmp_path / "plain", recompute="none")
    again = run(base, files, tmp_path / "again", recompute="all")
    assert losses(plain) == losses(again)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resume_is_bitwise_twice_and_across_epochs(base: Base, files: Path, tmp_path: Path, dropout: float) -> None:
    spec = LoRA(rank=4, alpha=8, dropout=dropout)
    whole = run(base, files, tmp_path / "whole", spec)
    stops = iter([5, 9])

    def interrupted(out: Path, resume: bool) -> list[Any]:
        config_events: list[Any] = []
        stop_at = next(stops, None)
        for event in events_of(base, files, out, spec, resume):
            config_events.append(event)
            if isinstance(event, Step) and event.step == stop_at:
                break
        return config_events

    first = interrupted(tmp_path / "parts", False)
    second = interrupted(tmp_path / "parts", True)
    third = interrupted(tmp_path / "parts", True)
    assert losses(first) + losses(second)[1:] != []
    seen = {e.step: e.loss for events in (first, second, third) for e in events if isinstance(e, Step)}
    assert [seen[s] for s in sorted(seen)] == losses(whole)
    last = [Adapter.load(tmp_path / name / "last") for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(tensors(last[0]), tensors(last[1]), strict=True))
    lines = (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(losses(whole)) + 1))


def events_of(base: Base, files: Path, out: Path, spec: Any, resume: bool) -> Iterator[Any]:
    config = RunConfig(
        base=base.name,
        data={"train": files / "train.jsonl", "eval": files / "eval.jsonl", "general": files / "general.jsonl"},
        method={"kind": spec.kind} | spec.model_dump(mode="json"),
        train=SETTINGS,
        out=out,
    )
    return run_task(base, read_task(base, Resolved(config, {})), out, resume=resume)


def test_the_seed_covers_init_order_and_dropout(base: Base, files: Path, tmp_path: Path) -> None:
    spec = LoRA(rank=4, dropout=0.1)
    one, two, three = (
        run(base, files, tmp_path / str(i), spec, seed=seed, max_steps=3) for i, seed in enumerate((7, 7, 8))
    )
    assert losses(one) == losses(two)
    assert losses(one) != losses(three)


def test_the_adapter_folder_is_the_best_and_last_is_the_last(base: Base, files: Path, tmp_path: Path) -> None:
    run(base, files, tmp_path / "run", lr=0.5, epochs=20, patience=2, eval_every=1)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = [(line["eval_loss"], line["step"]) for line in lines if line.get("eval_loss") is not None]
    assert min(evaluated)[1] != evaluated[-1][1], "the test needs a run that gets worse"
    best, last = (Adapter.load(tmp_path / "run" / name) for name in ("adapter", "last"))
    assert best.digest != last.digest


def test_patience_ends_a_run_that_no_longer_improves(base: Base, files: Path, tmp_path: Path) -> None:
    events = run(base, files, tmp_path / "run", lr=0.5, epochs=20, patience=2, eval_every=1)
    assert isinstance(events[-1], Finished) and events[-1].reason == "patience"


def test_a_value_that_is_not_finite_stops_the_run_with_the_evidence(base: Base, files: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: loss is"):
        run(base, files, tmp_path / "run", lr=1e38, clip=None, epochs=4)
    assert json.loads((tmp_path / "run/not-finite.json").read_text())["rows"]


def test_parameters_that_are_not_finite_stop_the_run_before_they_are_saved(
    base: Base, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"step 1: loss is .*; it made parameters that are not finite; rows"):
        run(base, files, tmp_path / "run", lr=1e39, warmup=0)
    assert not (tmp_path / "run/adapter").exists()


def test_two_runs_in_one_folder_are_refused(base: Base, files: Path, tmp_path: Path) -> None:
    first = events_of(base, files, tmp_path / "run", LoRA(rank=2), False)
    next(first)
    with pytest.raises(Conflict, match="another run"):
        list(events_of(base, files, tmp_path / "run", LoRA(rank=2), False))
    list(first)
    with pytest.raises(Conflict, match="already holds a run"):
        list(events_of(base, files, tmp_path / "run", LoRA(rank=2), False))


def test_a_run_whose_checkpoint_is_gone_is_not_begun_again_over_its_adapter(
    base: Base, files: Path, tmp_path: Path
) -> None:
    run(base, files, tmp_path / "run", max_steps=4)
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(Conflict, match="checkpoint is gone"):
        run(base, files, tmp_path / "run", resume=True, max_steps=4)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_resuming_another_configuration_is_refused(base: Base, files: Path, tmp_path: Path) -> None:
    run(base, files, tmp_path / "run", max_steps=4)
    with pytest.raises(VeneerError, match="belongs to another run"):
        run(base, files, tmp_path / "run", resume=True, max_steps=4, lr=2e-2)


def test_resuming_on_a_start_from_other_general_text_is_refused(base: Base, files: Path, tmp_path: Path) -> None:
    tinylm.folder(tmp_path / "base")
    for name, start in (("train", 0), ("eval", 100), ("general", 300)):
        tinylm.chat_rows(tmp_path / f"{name}.jsonl", 30 if name == "train" else 8, start=start)
    method = LoRA(rank=3, init="corda_kpm")
    run(base, tmp_path, tmp_path / "run", method, max_steps=4)
    tinylm.chat_rows(tmp_path / "general.jsonl", 8, start=500)
    with pytest.raises(VeneerError, match="belongs to another run"):
        run(base, tmp_path, tmp_path / "run", method, resume=True, max_steps=4)


def test_resuming_nothing_says_so(base: Base, files: Path, tmp_path: Path) -> None:
    first = next(iter(running(base, files, tmp_path / "run", resume=True, max_steps=4)))
    assert any("begins at step 0" in warning for warning in first.warnings)
    run(base, files, tmp_path / "other", max_steps=4)
    again = next(iter(running(base, files, tmp_path / "other", resume=True, max_steps=4)))
    assert not any("begins at step 0" in warning for warning in again.warnings)


def test_memory_is_estimated_for_the_longest_row_whatever_a_pass_holds(base: Base, files: Path, tmp_path: Path) -> None:
    def needed(out: str, **settings: Any) -> dict[str, int]:
        first = next(iter(running(base, files, tmp_path / out, max_steps=1, recompute="none", **settings)))
        assert isinstance(first, Preflight)
        return dict(first.memory)

    usual, small = needed("one", tokens_per_pass=120), needed("two", tokens_per_pass=1)
    assert small["activations"] > usual["activations"] / 8
    with pytest.raises(ResourceError, match="the budget is"):
        needed("three", tokens_per_step=1, tokens_per_pass="auto", memory=sum(small.values()) - 1000)


def test_a_full_disk_leaves_the_last_checkpoint(
    base: Base, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    run(base, files, tmp_path / "run", max_steps=4)
    before = (tmp_path / "run/checkpoint/state.safetensors").read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        from veneer.train.checkpoint import write_bytes

        write_bytes(tmp_path / "run/checkpoint/state.safetensors", b"half")
    assert (tmp_path / "run/checkpoint/state.safetensors").read_bytes() == before
    assert not list((tmp_path / "run/checkpoint").glob(".*part"))


def test_one_call_from_rows_to_an_adapter(base: Base, files: Path, tmp_path: Path) -> None:
    adapter = train(base, files / "train.jsonl", method=LoRA(rank=2), out=tmp_path / "run", max_steps=3, max_length=128)
    assert adapter.spec.kind == "lora" and len(adapter.targets) == 7 * base.config.layers
    assert (tmp_path / "run/report.md").exists()


def test_rows_of_two_tokens_are_learned_though_attention_has_nothing_to_choose(base: Base, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    train(base, tmp_path / "rows.jsonl", method=LoRA(rank=2), out=tmp_path / "run", max_steps=2, max_length=16)
    told = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(told) == 2 and told[1] < told[0]


def test_the_base_never_changes(base: Base, files: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in base.decoder.tensors.items()}
    run(base, files, tmp_path / "run", max_steps=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.decoder.tensors.items())


@pytest.mark.parametrize(
    "method", [LoRA(rank=2, targets=("embed_tokens", "q_proj")), Bottleneck(size=4), VeRA(rank=4, dropout=0.5)]
)
def test_methods_that_are_not_a_plain_update_of_linear_layers_run_and_save(
    base: Base, files: Path, tmp_path: Path, method: Method
) -> None:
    events = run(base, files, tmp_path / "run", method, epochs=1)
    assert isinstance(events[-1], Finished) and Adapter.load(tmp_path / "run/adapter").spec.kind == method.kind


def test_dropout_acts_wherever_a_method_has_it(base: Base, files: Path, tmp_path: Path) -> None:
    one = run(base, files, tmp_path / "a", VeRA(rank=4), epochs=1)
    other = run(base, files, tmp_path / "b", VeRA(rank=4, dropout=0.5), epochs=1)
    assert losses(one)[0] == losses(other)[0] and losses(one)[1:] != losses(other)[1:]
    with pytest.raises(ConfigError, match="recompute: all"):
        run(base, files, tmp_path / "c", LoRA(rank=2, dropout=0.1), recompute="all")


def test_a_run_goes_on_only_over_the_same_quantisation(base: Base, files: Path, tmp_path: Path) -> None:
    run(base, files, tmp_path / "run", max_steps=2)
    quantized = load_base(str(files / "base"), dtype="float32", quantize="int8")
    with pytest.raises(ConfigError, match="belongs to another run"):
        run(quantized, files, tmp_path / "run", resume=True, max_steps=2)


def test_training_on_bf12_is_training_on_bf16(files: Path, tmp_path: Path) -> None:
    found = []
    for kind in (None, "bf12"):
        on = load_base(str(files / "base"), dtype="bfloat16", quantize=kind)
        events = run(on, files, tmp_path / str(kind), max_steps=4)
        found.append((losses(events), tensors(Adapter.load(tmp_path / str(kind) / "adapter"))))
    (plain, wanted), (packed, other) = found
    assert plain == packed and all(map(torch.equal, wanted, other))


def test_every_step_of_a_checkpoint_is_in_the_metrics(base: Base, files: Path, tmp_path: Path) -> None:
    for event in running(base, files, tmp_path / "run", eval_every=100, save_every=2):
        if isinstance(event, Saved):
            break
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_an_evaluation_that_is_not_finite_stops_the_run(
    base: Base, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = RowLosses(torch.tensor([float("nan")]), torch.ones(1))
    monkeypatch.setattr(importlib.import_module("veneer.train.run"), "row_losses", lambda *_, **__: bad)
    with pytest.raises(TrainingError, match="evaluation after step 3 is not finite"):
        run(base, files, tmp_path / "run")
    assert not (tmp_path / "run/adapter").exists()
