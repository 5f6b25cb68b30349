"""A new user's path on the real demo base: own rows, plan, train, prove, look, ask, merge, keep. Public commands only."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import veneer as vn
from tests.e2e.world import veneer
from veneer.models.catalog import is_installed

BASE = "smollm2-135m"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(BASE), reason="the demo base is not installed")]
GOODS = {"lamp": "B4", "chair": "C7", "desk": "C9", "rug": "A2", "vase": "A5", "clock": "B1", "mirror": "D3"}
QUESTIONS = ("Where is the {}?", "Which aisle has the {}?", "I am looking for a {}.", "Can you find me the {}?")
Say = Callable[..., str]
RUN = """\
base: smollm2-135m
data: {train: train.jsonl, eval: eval.jsonl}
method: {kind: lora, rank: 4, alpha: 8}
train: {max_steps: 8, lr: 2e-3, tokens_per_step: 256, eval_every: 4, max_length: 96, dtype: float32}
out: runs/shop
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's own rows and a run file."""
    folder = tmp_path_factory.mktemp("shop")
    rows = [
        {
            "messages": [
                {"role": "user", "content": question.format(thing)},
                {"role": "assistant", "content": f"Aisle {place}."},
            ]
        }
        for thing, place in GOODS.items()
        for question in QUESTIONS
    ]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:22]), ("eval", rows[22:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "run.yaml").write_text(RUN)
    return folder


def test_from_own_rows_to_an_adapter_in_a_library(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop)

    def say(*arguments: str) -> str:
        answer = veneer(capsys, *arguments)
        assert answer.code == 0, f"{arguments}: {answer.err}"
        assert "Traceback" not in answer.err
        return answer.out

    planned = json.loads(say("plan", "--config", "run.yaml", "--json"))["methods"][0]
    trains(say, planned["trained"])
    helps(say)
    is_sound(say)
    answered = say("generate", "Where is the lamp?", "--base", BASE, "--adapter", "runs/shop", "--max-tokens", "8")
    assert answered.strip()
    merges_to_the_same_logits(say)
    is_kept(say)


def trains(say: Say, planned: int) -> None:
    said = say("train", "run.yaml")
    assert "trains" in said and "of them learned" in said and "memory:" in said
    assert "the adapter is in runs/shop/adapter, the report in runs/shop/report.md" in said
    for name in (
        "config.yaml",
        "adapter",
        "last",
        "metrics.jsonl",
        "report.md",
        "loss.png",
        "checkpoint",
        "provenance.json",
    ):
        assert (Path("runs/shop") / name).exists(), name
    lines = [json.loads(line) for line in Path("runs/shop/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert re.search(r"lr: 0\.002 +# run\.yaml:4", Path("runs/shop/config.yaml").read_text())
    assert vn.Adapter.load("runs/shop/adapter").num_parameters == planned


def helps(say: Say) -> None:
    text = "The river rose in spring and the village moved its boats to the upper meadow."
    Path("general.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in (text, text.upper())))
    options = ("--data", "eval.jsonl", "--general", "general.jsonl", "--dtype", "float32", "--generate", "2", "--json")
    report = json.loads(say("eval", "--base", BASE, "--adapter", "shop=runs/shop", *options))
    assert {"base", "adapters"} <= report.keys() and list(report["adapters"]) == ["shop"]
    for column in (report["base"], report["adapters"]["shop"]):
        assert {"loss", "loss_low", "loss_high", "bits_per_byte", "general_loss"} <= column.keys()
        assert column["loss_low"] <= column["loss"] <= column["loss_high"]
    assert report["adapters"]["shop"]["loss_high"] < report["base"]["loss_low"]


def is_sound(say: Say) -> None:
    facts = json.loads(say("inspect", "runs/shop", "--json"))
    assert facts["kind"] == "lora" and facts["provenance"]["base_name"] == BASE
    assert json.loads(say("doctor", "--base", BASE, "runs/shop", "--json"))["worst"] != "error"


def merges_to_the_same_logits(say: Say) -> None:
    import transformers

    say("merge", "--base", BASE, "--adapter", "runs/shop", "--out", "merged", "--dtype", "float32", "--no-check")
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained("merged")(
        "Which aisle has the lamp?", return_tensors="pt"
    ).input_ids
    base = vn.load_base(BASE, dtype="float32")
    with torch.no_grad(), vn.attached(base, vn.Adapter.load("runs/shop")):
        attached = base.logits(ids)
    with torch.no_grad():
        difference = (merged(ids).logits - attached).abs().max() / attached.abs().max()
    assert float(difference) < 1e-4, float(difference)


def is_kept(say: Say) -> None:
    say("library", "add", "runs/shop", "--name", "shop", "--base", BASE, "--library", "shelf")
    say("library", "alias", "shop@1", "production", "--library", "shelf")
    kept = json.loads(say("library", "list", "--library", "shelf", "--json"))
    assert [entry["ref"] for entry in kept] == ["shop@1"] and kept[0]["aliases"] == ["production"]
    say("library", "verify", "--library", "shelf")
