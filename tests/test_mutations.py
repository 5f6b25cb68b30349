"""Wrong code must fail: each mutation changes one line that decides a number, and a named test file has to notice.

A mutation is applied to a copy of `src`; the tests run against the copy in a process of their own. One that no test notices is
a hole in the tests, not in the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

MUTATIONS = {
    "scale-without-rank": (
        "types.py",
        'SCALE_RULES["alpha/r"] = lambda alpha, rank: alpha / rank',
        'SCALE_RULES["alpha/r"] = lambda alpha, rank: alpha',
        "tests/inject/test_targets.py tests/formats/test_peft_parity.py",
    ),
    "rslora-without-root": (
        "types.py",
        "lambda alpha, rank: alpha / math.sqrt(rank)",
        "lambda alpha, rank: alpha / rank",
        "tests/formats/test_peft_parity.py",
    ),
    "prompt-is-learned-too": (
        "data/masking.py",
        "weights[inside] = span.weight",
        "weights[:] = span.weight",
        "tests/data/test_masking.py",
    ),
    "labels-not-shifted": (
        "data/packing.py",
        "np.concatenate([tokens[1:] for tokens, _ in parts])",
        "np.concatenate([tokens[:-1] for tokens, _ in parts])",
        "tests/data/test_packing.py",
    ),
    "mean-of-means": (
        "train/loop.py",
        "loss = pass_loss(run.base, leaves, item, run.recompute) / weight",
        "loss = pass_loss(run.base, leaves, item, run.recompute) / float(item.weights.sum()) / len(passes)",
        "tests/train/test_runs.py",
    ),
    "merge-of-twice-the-update": (
        "merge/plan.py",
        'return (b, a) if self.shape.kind == "linear"',
        'return (b, 2 * a) if self.shape.kind == "linear"',
        "tests/merge/test_merge.py",
    ),
    "adapter-of-the-neighbour": (
        "models/bank.py",
        "spans.append(Span(row, row + segment.length, segment.adapter))",
        "spans.append(Span(row, row + segment.length, max(segment.adapter, 0)))",
        "tests/engine/test_engine.py",
    ),
    "seat-of-a-stranger": (
        "engine/arena.py",
        "self.store[:, :, seat, length:] = 0",
        "pass",
        "tests/engine/test_arena.py",
    ),
    "merged-set-for-everybody": (
        "engine/engine.py",
        "residents.keys() == {self._hot.adapter}",
        "self._hot.adapter in residents",
        "tests/engine/test_hot.py",
    ),
    "prefixes-of-a-merged-set-outlive-it": (
        "engine/engine.py",
        "self._admission.forget(digest)",
        "pass",
        "tests/engine/test_hot.py",
    ),
    "base-rows-on-the-merged-set": (
        "engine/engine.py",
        "merged = merged and all(seq.adapter for seq in step.seqs)",
        "merged = bool(merged)",
        "tests/engine/test_hot.py",
    ),
}


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_wrong_code_is_noticed(name: str, tmp_path: Path) -> None:
    file, right, wrong, tests = MUTATIONS[name]
    copy = tmp_path / "src"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "veneer" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{file} has changed: bring this mutation up to date"
    path.write_text(text.replace(right, wrong))
    environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
    ]
    done = subprocess.run(
        [*command, *tests.split()], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 1, f"no test noticed:\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
    assert str(copy) in done.stdout + _where(environment), "the tests must run the copy"


def _where(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", "import veneer; print(veneer.__file__)"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
