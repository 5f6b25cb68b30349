"""`veneer plan` end to end, from a size, a folder with nothing but config.json, and a run file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.cli.main import run
from veneer.plan.sizes import KNOWN

Output = pytest.CaptureFixture[str]


def answer(capsys: Output, *arguments: str) -> dict[str, dict[str, int]]:
    assert run(["plan", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    return {row["method"]: row["bytes"] | {"trained": row["trained"]} for row in found["methods"]}


def test_a_size(capsys: Output) -> None:
    rows = answer(capsys, "--params", "7B", "--rank", "16")
    assert list(rows) == ["full", "lora", "qlora"]
    assert rows["lora"]["trained"] == 39_976_960
    assert rows["qlora"]["base"] < rows["lora"]["base"] / 3
    for row in rows.values():
        assert row["total"] == sum(size for name, size in row.items() if name not in ("total", "trained"))
        assert row["adapter"] + row["gradients"] + row["optimizer"] == 16 * row["trained"]


def test_a_folder_needs_its_config_only(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["LLaMA-7B"]))
    assert answer(capsys, "--base", str(tmp_path)) == answer(capsys, "--params", "7B")


def test_a_run_file(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["SmolLM2-135M"]))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {tmp_path}\nquantize: nf4\ndata: {{train: a.jsonl}}\nout: x\n"
        "method: {kind: lora, rank: 4, targets: [q_proj, v_proj]}\ntrain: {tokens_per_pass: 100}\n"
    )
    assert run(["plan", "--config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "q_proj" in shown and "100 tokens a pass" in shown
    plain = answer(capsys, "--config", str(file))["lora"]
    assert plain["trained"] == 30 * 4 * (576 + 576 + 576 + 192)
    text = file.read_text()
    file.write_text(text.replace("{tokens_per_pass: 100}", "{tokens_per_step: 256}"))
    assert run(["plan", "--config", str(file)]) == 0
    assert "256 tokens a pass" in capsys.readouterr().out
    stored = answer(capsys, "--config", str(file))["lora"]["activations"]
    file.write_text(text.replace("{tokens_per_pass: 100}", "{tokens_per_step: 256, recompute: all}"))
    assert answer(capsys, "--config", str(file))["lora"]["activations"] < stored / 4
    for optimizer, trained, state in (("lora_fa", 30 * 4 * (576 + 192), 8), ("lora_pro", plain["trained"], 4)):
        file.write_text(text.replace("{tokens_per_pass: 100}", f"{{tokens_per_pass: 100, optimizer: {optimizer}}}"))
        other = answer(capsys, "--config", str(file))["lora"]
        assert other["trained"] == trained and other["optimizer"] == state * trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to plan for"),
        (["--params", "7B", "--base", "x"], "say what to plan for"),
        (["--params", "900B"], "no known shape is near"),
        (["--params", "7B", "--methods", "lroa"], "did you mean 'lora'"),
        (["--params", "7B", "--dtype", "fp8"], "bfloat16 or float32"),
        (["--params", "7B", "--rank", "100000"], "above the layer's"),
    ],
)
def test_questions_without_an_answer(arguments: list[str], message: str, capsys: Output) -> None:
    assert run(["plan", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err
