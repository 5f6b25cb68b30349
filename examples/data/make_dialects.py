"""cockney, jive and nyc: sentences from Debian's `fortunes`, and what the programs of Debian's `filters` make of them.

    apt-get install filters fortunes fortunes-min
    python examples/data/make_dialects.py

The three tasks ask the same thing in the same words, so that only the adapter decides which dialect answers; and all three hold
out the same sentences.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from writing import chat, shuffled, write

DIALECTS = ("cockney", "jive", "nyc")
TRAIN, EVAL = 400, 120
FORTUNES = Path("/usr/share/games/fortunes")
FILES = (
    *("computers", "cookie", "disclaimer", "education", "food", "fortunes", "goedel", "humorists", "law", "literature"),
    *("medicine", "miscellaneous", "news", "people", "pets", "platitudes", "science", "sports", "wisdom", "work"),
)
SENTENCE = re.compile(r"[A-Z][A-Za-z ,;'-]+[.!?]")
UNWANTED = re.compile(
    r"\b(sex\w*|women|woman|wom[ae]n\w*|girls?|wi[fv]es?|wife|virgin\w*|whore\w*|bitch\w*|bastard\w*|damn\w*|hell|god\w*|jesus|"
    r"jew\w*|black\w*|negro\w*|honk\w*|mama|suck\w*|drunk\w*|kill\w*|dead|die[sd]?|death|gay|nude|naked|fuck\w*|shit\w*|ass|"
    r"crap\w*|slut\w*|dick|race|racial\w*|nazi\w*|suicide|rape\w*|breast\w*)\b",
    re.IGNORECASE,
)


def sentences() -> list[str]:
    """Fortunes that are one plain sentence of 40 to 90 characters."""
    found = []
    for name in FILES:
        for fortune in (FORTUNES / name).read_text(encoding="utf-8").split("\n%\n"):
            text = fortune.strip("\n")
            if 40 <= len(text) <= 90 and SENTENCE.fullmatch(text) and not UNWANTED.search(text):
                found.append(text)
    return shuffled(found)


def spoken(text: str, dialect: str) -> str:
    """The sentence in a dialect, without the exclamations ("Okay?") that the programs append after two spaces."""
    done = subprocess.run([f"/usr/games/{dialect}"], input=text + "\n", capture_output=True, text=True, check=True)
    return done.stdout.strip().split("  ")[0]


def main() -> None:
    kept: list[dict[str, str]] = []
    for text in sentences():
        versions = {dialect: spoken(text, dialect) for dialect in DIALECTS}
        changed = all(
            sum(a != b for a, b in zip(text.split(), new.split(), strict=False)) >= 2 for new in versions.values()
        )
        plain = all("\n" not in new and not UNWANTED.search(new) for new in versions.values())
        if changed and plain:
            kept.append({"plain": text, **versions})
    if len(kept) < TRAIN + EVAL:
        raise SystemExit(f"only {len(kept)} sentences are left, {TRAIN + EVAL} are needed")
    for dialect in DIALECTS:
        rows = [chat(f"Say it your way: {pair['plain']}", pair[dialect]) for pair in kept]
        write(f"{dialect}.train.jsonl", rows[EVAL : EVAL + TRAIN])
        write(f"{dialect}.eval.jsonl", rows[:EVAL])


if __name__ == "__main__":
    main()
