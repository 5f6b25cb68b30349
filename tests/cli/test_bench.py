"""`veneer bench methods` on a tiny base: runs, goes on after a kill, flags the edge, keeps a divergence as a result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import tinylm
from veneer.cli.main import run
from veneer.lab import compare, page
from veneer.lab.cell import held_out, run_cell
from veneer.lab.plan import Cell, Comparison, final_cells, read, search_cells

YAML = """
base: {base}
data: {{train: train.jsonl, eval: eval.jsonl, general: general.jsonl}}
methods:
  lora: {{method: {{kind: lora, rank: 2}}, rates: [1e-3, 3e-2, 1]}}
  ia3: {{method: {{kind: ia3}}, rates: [1e-5, 1e-3]}}
search_tokens: 400
tokens: 500
seeds: 2
answers: 0
train: {{tokens_per_step: 100, dtype: float32}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tinylm.chat_rows(folder / "train.jsonl", 40)
    tinylm.chat_rows(folder / "eval.jsonl", 9, start=100)
    (folder / "general.jsonl").write_text("".join(f'{{"text": "plain words {i}"}}\n' for i in range(4)))
    (folder / "compare.yaml").write_text(YAML.format(base=tinylm.folder(folder / "base", num_hidden_layers=1)))
    return folder / "compare.yaml"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells run here, where no process has to start; the names of those that ran."""
    ran: list[str] = []

    def spawn(cell: Cell, place: Path, watch: compare.Watch) -> None:
        ran.append(cell.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(run_cell(cell, lambda tokens: watch(cell, tokens))))

    monkeypatch.setattr(compare, "_spawn", spawn)
    return ran


def test_a_comparison_from_the_command_line(
    config: Path, tmp_path: Path, in_this_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "methods", "--config", str(config), "--out", str(tmp_path / "out")]
    assert run(words) == 0
    assert len(in_this_process) == 5 + 4
    shown = capsys.readouterr().out
    assert "note: ia3: its best rate, 0.001, is the highest of its grid" in shown
    document = json.loads((tmp_path / "out" / "methods.json").read_text())
    rows = {row["method"]: row for row in document["methods"]}
    assert rows["ia3"]["edge"] == "highest" and rows["ia3"]["rate"] == 1e-3
    lora = rows["lora"]
    tried = {rate: loss for rate, loss in lora["search"]}
    assert lora["rate"] == min(tried, key=tried.__getitem__) and lora["seeds"] == 2
    assert lora["figures"]["loss"]["low"] < lora["figures"]["loss"]["value"] < lora["figures"]["loss"]["high"]
    assert {"general_loss", "loss", "bits_per_byte"} <= set(lora["changes"])
    assert lora["parameters"] == 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    text = (tmp_path / "out" / "methods.md").read_text()
    assert "| lora | " in text and "0.001 (edge)" in text and "Made by" in text
    assert (tmp_path / "out" / "methods.png").stat().st_size > 10_000
    before = (tmp_path / "out" / "methods.md").read_text()
    in_this_process.clear()
    assert run(words) == 0
    assert in_this_process == [], "everything was there already"
    assert (tmp_path / "out" / "methods.md").read_text() == before
    assert run([*words, "--methods", "ia3", "--seeds", "3"]) == 0
    assert in_this_process == ["final-ia3-0.001-seed3"], "one more seed is one more training"


def test_each_cell_is_a_process_and_a_kill_costs_one(config: Path, tmp_path: Path) -> None:
    """The whole program is killed while its second training begins, and goes on with that one."""
    cells = tmp_path / "cells"
    command = [
        sys.executable, "-c", "from veneer.cli.main import main; main()", "bench", "methods", "--config", str(config),
        "--methods", "ia3", "--set", "methods.ia3.rates=[1e-3]", "--seeds", "1", "--out", str(tmp_path / "out"),
        "--cells", str(cells),
    ]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        first = cells / "search-ia3-0.001-seed0.json"
        end = time.monotonic() + 120
        while not first.exists() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        assert first.exists()
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    kept = sorted(path.name for path in cells.iterdir())
    assert kept == [first.name], "nothing half-written"
    written = first.stat().st_mtime_ns
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert first.stat().st_mtime_ns == written
    result = json.loads(next(cells.glob("final-*.json")).read_text())
    assert result["peak_bytes"] > 10**8 and result["seconds_per_step"] > 0
    assert (
        json.loads((tmp_path / "out" / "methods.json").read_text())["methods"][0]["peak_bytes"] == result["peak_bytes"]
    )


def test_a_refusal_in_a_cell_is_said_here(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "methods", "--config", str(config), "--out", str(tmp_path), "--methods", "lora"]
    assert run([*words, "--set", "methods.lora.method.targets=[nowhere]"]) == 1
    error = capsys.readouterr().err
    assert "search-lora-0.001-seed0: " in error and "'nowhere' matches nothing" in error


def result_of(loss: float | None, **more: Any) -> dict[str, Any]:
    return {"fingerprint": "x", **({"failed": "step 3: loss is nan"} if loss is None else {"loss": loss}), **more}


def comparison(config: Path) -> Comparison:
    return read(config, [], config.parent)


def test_rates_that_diverge_are_results(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: Mapping[float, float | None] = {1e-3: 2.0, 3e-2: 1.5, 1.0: None, 1e-5: None}

    def spawn(cell: Cell, place: Path, watch: compare.Watch) -> None:
        figure = {"base": {"value": 3.0}, "value": {"value": 1.0 + cell.seed, "low": 0.0, "high": 9.0}}
        scored = {"scores": {"loss": figure | {"change": figure["value"]}}, "parameters": 7, "peak_bytes": 10**9}
        found = result_of(losses[cell.rate] if cell.method == "lora" else None)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(
            json.dumps(
                found | {"fingerprint": cell.fingerprint, "seconds_per_step": 0.5} | (scored if cell.seed else {})
            )
        )

    monkeypatch.setattr(compare, "_spawn", spawn)
    result = compare.run(comparison(config), tmp_path)
    lora, ia3 = result.rows
    assert lora.rate == 3e-2 and lora.edge == "" and lora.search[-1] == (1.0, None)
    assert ia3.rate is None and len(ia3.failed) == 2 and not ia3.figures
    assert len(page.flags(result)) == 2 and "2 of its trainings diverged" in page.flags(result)[1]
    _, rows = page.columns(result)
    assert rows[0][:2] == ["lora", "0.03"] and rows[1][:3] == ["ia3", "diverged", "-"]
    json.dumps(page.document(result), allow_nan=False)
    # Seeds 1 and 2 gave 2.0 and 3.0: mean 2.5, standard error 0.5, t = 12.706 with one degree of freedom.
    loss = lora.figures["loss"]
    assert loss.value == 2.5 and loss.high == pytest.approx(2.5 + 12.706 * 0.5, rel=1e-4)


def test_intervals_are_students_t() -> None:
    # Textbook: 5 values with mean 10 and standard deviation 2 give 10 +- 2.776 * 2 / sqrt(5).
    values = [10 - 2 * 2**0.5, 10.0, 10.0, 10.0, 10 + 2 * 2**0.5]
    found = compare.over_seeds([{"value": v, "low": 0.0, "high": 0.0} for v in values])
    assert found.value == pytest.approx(10)
    assert found.high - found.value == pytest.approx(2.776 * 2 / 5**0.5, rel=1e-3)
    one = compare.over_seeds([{"value": 1.0, "low": 0.5, "high": 2.0}])
    assert (one.value, one.low, one.high) == (1.0, 0.5, 2.0)


def test_what_decides_a_cell_is_in_its_fingerprint(config: Path, tmp_path: Path) -> None:
    cells = search_cells(comparison(config))
    assert len({cell.fingerprint for cell in cells}) == len({cell.name for cell in cells}) == 5
    again = search_cells(read(config, ["tokens=900", "seeds=5"], config.parent))
    assert [c.fingerprint for c in again] == [c.fingerprint for c in cells], "the search does not hang on the finals"
    for change in (
        "search_tokens=401",
        "train.tokens_per_step=101",
        "base=other",
        "quantize=bf12",
        "methods.lora.method.rank=3",
    ):
        changed = search_cells(read(config, [change], config.parent))
        assert changed[0].fingerprint != cells[0].fingerprint
    finals = final_cells(comparison(config), {"lora": 3e-2})
    assert [cell.seed for cell in finals] == [1, 2] and finals[0].tokens == 500


def test_held_out_rows_are_used_once(config: Path) -> None:
    from veneer.data import load

    rows = load(config.parent / "eval.jsonl")
    search, final = held_out(rows)
    assert (len(search), len(final)) == (3, 6)
    assert [*search, *final] == list(rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "train.lr=1"], "train.lr: a comparison sets it itself"),
        (["--set", "methods.lora.method.rnk=2"], "methods.lora.method.rnk: unknown key; did you mean 'rank'"),
        (["--set", "methods.lora.rates=[1e-3, -1]"], "-1 is not a positive number"),
        (["--set", "sedes=2"], "sedes: unknown key; did you mean 'seeds'"),
        (["--methods", "loar"], "'loar': did you mean 'lora'"),
        (["--tokens", "0"], "tokens: "),
        (["--set", "quantize=bf13"], "quantize: no base format is called 'bf13'; did you mean 'bf12'"),
    ],
)
def test_wrong_comparisons_say_what_is_wrong(
    words: list[str], said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "methods", "--config", str(config), "--out", str(tmp_path / "o"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_too_few_tokens_for_a_step(config: Path) -> None:
    from veneer.errors import ConfigError

    [cell, *_] = search_cells(read(config, ["search_tokens=50"], config.parent))
    with pytest.raises(ConfigError, match="50 training tokens are 1 steps of 100, too few"):
        run_cell(cell)


def test_the_other_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert {"methods", "train", "serve", "steps"} <= set(known) and "run" not in known and "train_veneer" not in known
    assert run(["bench", "trian"]) == 1
    assert "no benchmark is called 'trian'" in capsys.readouterr().err
    assert run(["bench", "train", "--seeds", "2"]) == 2
    assert "only `veneer bench methods` takes this" in capsys.readouterr().err
    assert run(["bench", "serve", "--profile", "traces"]) == 2
    assert "only `veneer bench train` takes this" in capsys.readouterr().err
