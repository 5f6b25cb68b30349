"""What an adapter said when it was saved, and whether it says the same here.

An adapter can load without an error and still do something else: a scale read by another rule, a base that was quantised badly,
a kernel that is wrong on this machine. So a saved adapter keeps the logits of a few tokens after one short text, with the base's
own beside them, and whoever loads it can ask again.

The surprise: what is compared is the change that the adapter makes, not the logits. Another precision moves both sides alike.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from veneer.adapter import Adapter, Probe
from veneer.diagnose.finding import Finding
from veneer.errors import FormatError
from veneer.methods import lower
from veneer.models.bank import EMPTY, Bank
from veneer.models.base import Base
from veneer.registry import Latest
from veneer.types import Segment, Span

TEXT = "Once upon a time there was a"
WITHOUT_TOKENIZER = (1, 2, 3, 5, 8)
TOKENS = 8
FAR = 0.5
"""Part of its change by which an adapter may differ: a base in 4 bits moves it by a tenth, a wrong scale by more than all."""
NOISE = 0.5
"""Norm over `TOKENS` logits that rounding may move anyway."""
KEPT = 8
_SAID: WeakKeyDictionary[Base, Latest[tuple[int, ...], Tensor]] = WeakKeyDictionary()


def probed(adapter: Adapter, base: Base) -> Adapter:
    """`adapter` with what it says on `base` kept in its provenance."""
    with torch.no_grad():
        lowered = lower(adapter, base)
        tokens = WITHOUT_TOKENIZER if base.tokenizer is None else tuple(base.tokenizer.encode(TEXT))
        ids = (*(t % base.config.vocab for t in tokens), *(lowered.invocation or ()))
        said = _scores(base, base.bank([lowered]), 0, ids)
        logits, top = said.topk(min(TOKENS, len(said)))
        plain = _scores(base, EMPTY, -1, ids)[top]
    # bf16's own digits: more would not repeat on another machine
    rounded = [tuple(round(value, 3) for value in values.tolist()) for values in (logits, plain)]
    probe = Probe(adapter.digest, ids, tuple(top.tolist()), rounded[0], rounded[1])
    return replace(adapter, provenance=replace(adapter.provenance, probe=probe))


def drift(adapter: Adapter, base: Base, bank: Bank | None = None) -> float | None:
    """How far the change that `adapter` makes is from the one it was saved with, in parts of that one.

    None without a probe of this very adapter. `bank` holds it alone, where it has been packed already. What rounding may move
    does not count.
    """
    probe = adapter.provenance.probe
    if probe is None or probe.digest != adapter.digest or not _belongs(probe, base):
        return None
    with torch.no_grad():
        bank = base.bank([lower(adapter, base)]) if bank is None else bank
        tokens = torch.tensor(probe.tokens)
        now = _scores(base, bank, 0, probe.ids)[tokens] - _plain(base, probe.ids)[tokens]
    then = torch.tensor(probe.logits) - torch.tensor(probe.base)
    moved = float((now - then).norm())
    return max(0.0, moved - NOISE) / max(float(then.norm()), NOISE)


def check_probe(adapter: Adapter, base: Base, bank: Bank | None = None) -> bool:
    """Refuse an adapter that says something else than when it was saved. False where it keeps nothing that it said."""
    moved = drift(adapter, base, bank)
    if moved is not None and not moved <= FAR:
        raise FormatError(
            f"this adapter does not say what it said when it was saved: its change of the scores of {TOKENS} tokens differs "
            f"by {moved:.0%} of itself",
            help="`veneer doctor --base BASE ADAPTER` repeats this; try the base in 16 bits, or VENEER_NATIVE=0",
        )
    return moved is not None


def probe_findings(adapter: Adapter, base: Base) -> list[Finding]:
    """The same as a finding."""
    try:
        check_probe(adapter, base)
    except FormatError as error:
        cause = "its scale is read by another rule, the base was quantised badly, or a kernel is wrong on this machine"
        return [
            Finding("error", "adapter on base", error.message, cause, "load the base in 16 bits; try VENEER_NATIVE=0")
        ]
    return []


def _belongs(probe: Probe, base: Base) -> bool:
    """Whether the tokens are any of this base's."""
    return max((*probe.ids, *probe.tokens)) < base.config.vocab


def _plain(base: Base, ids: tuple[int, ...]) -> Tensor:
    """What the base alone says. Adapters were mostly asked about the same text, so the latest few are remembered."""
    known = _SAID.setdefault(base, Latest(KEPT))
    said = known.get(ids)
    if said is None:
        said = known[ids] = _scores(base, EMPTY, -1, ids)
    return said


def _scores(base: Base, bank: Bank, index: int, ids: tuple[int, ...]) -> Tensor:
    """Logits `[vocab]` after the last of `ids`, fp32."""
    decoder = base.decoder
    last = torch.tensor([len(ids) - 1], device=decoder.device)
    text = torch.tensor(ids, device=decoder.device)
    hidden = decoder.forward(text, [Segment(len(ids), 0, index)], bank, rows=last)
    return decoder.scores(hidden, (Span(0, 1, index),), bank)[0].float().cpu()
