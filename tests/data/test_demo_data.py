"""The committed demo data is what its README says: valid, held out, short, and without repeats."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.fake_tokenizer import FakeTokenizer
from veneer import data

FOLDER = Path(__file__).parents[2] / "examples" / "data"
TASKS = {"cockney": (400, 120), "jive": (400, 120), "nyc": (400, 120), "spam": (400, 120), "shell": (375, 100)}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_clean_and_held_out(task: str) -> None:
    tokenizer = FakeTokenizer()
    sets = [
        data.encode(data.load(FOLDER / f"{task}.{part}.jsonl"), tokenizer, max_length=700) for part in ("train", "eval")
    ]
    assert tuple(len(dataset) for dataset in sets) == TASKS[task]
    for dataset in sets:
        assert not data.statistics(dataset).duplicates and not dataset.notes
    assert data.leaks(*sets) == data.Leaks((), ())


def test_the_dialects_hold_out_the_same_sentences() -> None:
    asked = []
    for task in ("cockney", "jive", "nyc"):
        rows = data.load(FOLDER / f"{task}.eval.jsonl")
        asked.append([row.messages[0]["content"] for row in rows if isinstance(row, data.Chat)])
    assert asked[0] == asked[1] == asked[2]


def test_mail_verdicts_are_json_and_half_of_each() -> None:
    for part in ("train", "eval"):
        rows = [row for row in data.load(FOLDER / f"spam.{part}.jsonl") if isinstance(row, data.Chat)]
        labels = [json.loads(row.messages[-1]["content"])["label"] for row in rows]
        assert labels.count("spam") == labels.count("ham")
        assert not any(re.search(r"\w@\w|https?://|\d{5}", row.messages[0]["content"]) for row in rows), "redacted"


def test_shell_evaluation_lists_what_is_accepted() -> None:
    rows = [row for row in data.load(FOLDER / "shell.eval.jsonl") if isinstance(row, data.Chat)]
    assert all(row.messages[-1]["content"] in row.accepted for row in rows) and any(
        len(row.accepted) == 2 for row in rows
    )


def test_the_whole_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 3_000_000
    assert len(data.load(FOLDER / "general.jsonl")) == 200


def test_the_demo_touches_no_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [sys.executable, str(FOLDER.parent / "demo.py"), "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1 and "nothing was touched" in ran.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
