"""shell: a request in English, and the Bash command that does it. From InterCode-ALFA.

    pip download --no-deps icalfa==0.3.6
    python examples/data/make_shell.py icalfa-0.3.6-py3-none-any.whl

It has 300 requests, each with two right answers. Training sees both, as two rows; evaluation rows give both under `accepted`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from writing import chat, members, pinned, shuffled, write

SHA256 = "621590a41cd843793f669c2c097adab4924132fa693776d4866c9a0846217eeb"
EVAL = 100
ASK = "Answer with one Bash command."


def main() -> None:
    files = members(pinned(Path(sys.argv[1]), SHA256), "icalfa/assets/datasets/")
    cases = {
        case["query"].strip(): case
        for name, content in files.items()
        if name.endswith(".json")
        for case in json.loads(content)
    }
    requests = shuffled(cases)
    held_out, seen = requests[:EVAL], requests[EVAL:]
    train = [
        chat(f"{ASK} {request}", command)
        for request in seen
        for command in dict.fromkeys((cases[request]["gold"].strip(), cases[request]["gold2"].strip()))
    ]
    rows = []
    for request in held_out:
        accepted = list(dict.fromkeys((cases[request]["gold"].strip(), cases[request]["gold2"].strip())))
        rows.append(chat(f"{ASK} {request}", accepted[0], accepted=accepted))
    write("shell.train.jsonl", train)
    write("shell.eval.jsonl", rows)


if __name__ == "__main__":
    main()
