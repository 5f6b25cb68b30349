"""What works: method x way of running x precision x question, with the answer that is expected for each.

One table for two readers: `test_cells.py` and `test_training_*.py` try every cell, and `docs/generate.py` prints it. Methods come
from the registry and their answers follow from what they declare, so a new method is in the table, and tested, at once. What no
declaration says stands in `EXCEPTIONS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from veneer.methods import METHODS, Method, load_all

Way = Literal["native", "module"]
Weights = Literal["16-bit", "NF4"]
Question = Literal["trains", "reload", "peft", "merge", "mixed"]

WAYS: Mapping[Way, str] = {"native": "Native decoder", "module": "Any torch module"}
WEIGHTS: tuple[Weights, ...] = ("16-bit", "NF4")
QUESTIONS: Mapping[Question, tuple[str, str]] = {
    "trains": ("trains", "50 steps on the demo base: the loss on held-out rows falls (the slow tier of the tests)"),
    "reload": ("reload equal", "saved and loaded again: the same logits, bit for bit"),
    "peft": ("PEFT both ways", "PEFT loads our files and we load PEFT's: the same function"),
    "merge": ("merge", "the merged checkpoint, loaded on its own, is the adapted model"),
    "mixed": ("mixed batch", "in one batch with another adapter and the bare base, every row as alone"),
}
MODEL: Mapping[Way, str] = {
    "native": "a Llama, as the native decoder runs it (`vn.load_base`)",
    "module": "a transformers model that the native decoder does not know (OPT; for training the demo base), with `vn.attach`",
}
NO_PEFT = "Can't find 'adapter_config.json'"
PACKED = "stores torch.uint8, not numbers that an adapter can be trained around"
QUANTISED = "is a quantised checkpoint (bitsandbytes): an update would be rounded away on its grid"
SECOND = "already carries an adapter"
NO_BIAS = "a bias, and this model has none there"
MEANING: Mapping[str, str] = {
    NO_PEFT: "PEFT has no such method, so it finds no file of its own",
    PACKED: "4-bit layers of another library; load the base natively with `quantize: nf4`, or the module in 16 bit",
    QUANTISED: "merge into the 16-bit checkpoint; natively, `veneer merge` also writes 4-bit files",
    SECOND: "a plain module runs one adapter at a time; mixed batches are the native decoder's",
    NO_BIAS: "it merges where the layers have biases, as in GPT-2 and OPT",
}
"""What to do about a refusal, for the page."""


@dataclass(frozen=True)
class Cell:
    """One question to one method. `refusal` is None where it works, else a piece of the message that says why not."""

    kind: str
    way: Way
    weights: Weights
    question: Question
    refusal: str | None

    @property
    def is_slow(self) -> bool:
        return self.question == "trains" and self.refusal is None

    def __str__(self) -> str:
        return f"{self.kind}, {self.way}, {self.weights}, {self.question}"


EXCEPTIONS: Mapping[tuple[str, Way, Question], str] = {
    ("bitfit", "native", "merge"): NO_BIAS,
}
"""Refusals that follow from the model of the table and not from the method: a Llama has no biases to merge into."""


def cells() -> Iterator[Cell]:
    """The whole table."""
    for kind in sorted(load_all()):
        for way in WAYS:
            for weights in WEIGHTS:
                for question in QUESTIONS:
                    yield Cell(kind, way, weights, question, _refusal(kind, way, weights, question))


def _refusal(kind: str, way: Way, weights: Weights, question: Question) -> str | None:
    method = METHODS[kind]
    if way == "module":
        if method.site in ("tokens", "kv"):
            return f"acts on {method.site}, which a plain module does not offer"
        if weights == "NF4" and _is_on_linear_layers(method):
            return PACKED
        if question == "mixed":
            return SECOND
    if question == "peft" and method.peft is None:
        return NO_PEFT
    if question == "merge":
        if way == "module" and weights == "NF4":
            return QUANTISED
        if method.merged is Method.merged:
            return method.why_not_mergeable
    return EXCEPTIONS.get((kind, way, question))


def _is_on_linear_layers(method: type[Method]) -> bool:
    """Whether it stands on layers whose weights a 4-bit model packs."""
    return method.site == "weight" or "targets" in method.model_fields


def page() -> str:
    """The table in Markdown: a section for each way and precision, refusals as numbered notes."""
    everything = list(cells())
    notes = list(dict.fromkeys(cell.refusal for cell in everything if cell.refusal is not None))
    text = (
        "# What works\n\nEvery cell is a test that runs: of the thing itself where it says yes, of the refusal's text where "
        "it says no.\n\n"
    )
    text += "".join(f"- **{name}**: {meaning}.\n" for name, meaning in QUESTIONS.values())
    for way, title in WAYS.items():
        for weights in WEIGHTS:
            products = "bf16" if weights == "16-bit" else "fp32 (training the demo base: bf16)"
            text += f"\n## {title}, {weights}\n\nOn {MODEL[way]}; products in {products}.\n\n"
            text += (
                f"| method | {' | '.join(name for name, _ in QUESTIONS.values())} |\n|{'---|' * (len(QUESTIONS) + 1)}\n"
            )
            for kind in sorted(METHODS):
                row = [c for c in everything if (c.kind, c.way, c.weights) == (kind, way, weights)]
                shown = ["yes" if c.refusal is None else f"no ({notes.index(c.refusal) + 1})" for c in row]
                text += f"| [{kind}](methods.md#{kind}) | {' | '.join(shown)} |\n"
    text += "\n## What a no says\n\n"
    for number, note in enumerate(notes, 1):
        meaning = f": {MEANING[note]}" if note in MEANING else ""
        text += f'{number}. "{note}"{meaning}.\n'
    return text
