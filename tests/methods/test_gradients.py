"""Training differentiates what merging says: gradients through the native decoder equal those through merged dense weights.

The oracle is transformers' model with `methods.merged` put in its place by `functional_call`, and autograd on that. Each case is
one way in which an adapter can sit on a projection: beside a bias, over it, in its place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import tiny
from veneer import methods
from veneer.adapter import Adapter, Part
from veneer.errors import FormatError, TargetError, Unsupported
from veneer.inject.create import create
from veneer.models.bank import Dropout, spans_of
from veneer.models.base import Base
from veneer.models.project import spans_at
from veneer.types import Segment, Span

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(4))
LABELS = torch.roll(IDS.reshape(-1), -1)
ROWS = torch.tensor([2, 3, 7, 8, 11, 16])
SEGMENTS = [Segment(9, row, 0) for row in range(2)]
SEEN = int(IDS[0, 2])

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"kind": "lora", "rank": 2}),
    "lora and its biases": ("qwen2", {"kind": "lora", "rank": 2, "bias": "lora_only"}),
    "lora and all biases, Conv1D": ("gpt2", {"kind": "lora", "rank": 2, "bias": "all"}),
    "lora beside a whole layer": ("llama", {"kind": "lora", "rank": 2, "modules_to_save": ("q_proj",)}),
    "lora over a whole layer with a bias": (
        "qwen2",
        {"kind": "lora", "rank": 2, "targets": ("v_proj",), "modules_to_save": ("v_proj", "q_proj"), "bias": "all"},
    ),
    "lora, pissa": ("llama", {"kind": "lora", "rank": 2, "init": "pissa"}),
    "lora and token rows, tied": ("llama-tied-mha", {"kind": "lora", "rank": 2, "trainable_tokens": (5, SEEN)}),
    "lora on the embedding": ("llama", {"kind": "lora", "rank": 2, "targets": ("embed_tokens",)}),
    "lora on the head": ("llama", {"kind": "lora", "rank": 2, "targets": ("lm_head", "q_proj")}),
    "dora and its biases": ("llama-biases", {"kind": "dora", "rank": 2, "bias": "lora_only"}),
    "ia3": ("llama-biases", {"kind": "ia3"}),
    "ia3, Conv1D": ("gpt2", {"kind": "ia3"}),
    "bitfit": ("gpt2", {"kind": "bitfit"}),
    "vera": ("llama", {"kind": "vera", "rank": 4}),
    "full, Conv1D": ("gpt2", {"kind": "full", "targets": ("c_attn", "attn.c_proj", "wte")}),
    "full": ("qwen2", {"kind": "full", "targets": ("all-linear", "embed_tokens", "lm_head")}),
}


def live(adapter: Adapter) -> Adapter:
    """A copy whose trained tensors ask for gradients."""
    parts = []
    for part in adapter.parts:
        frozen = methods.method_of(adapter, part).frozen()
        trained = {n: t.clone().requires_grad_() for n, t in part.tensors.items() if n not in frozen}
        parts.append(replace(part, tensors={**part.tensors, **trained}))
    return replace(adapter, parts=tuple(parts))


def fresh(base: Base, fields: dict[str, Any]) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    adapter = create(base, methods.parse(fields), generator)
    return adapter.map_tensors(
        lambda t: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
    )


def native_loss(base: Base, adapter: Adapter, dropout: Dropout | None = None) -> Tensor:
    """The loss as training runs it, its gradients sent back through leaves."""
    lowered = [methods.lower(adapter, base)]
    bank = base.bank(lowered, dropout=dropout)
    leaves, pairs = bank.leaves()
    hidden = base.decoder.forward(IDS.reshape(-1), SEGMENTS, leaves, rows=ROWS)
    loss = base.decoder.loss(hidden, LABELS[ROWS], None, spans_at(spans_of(SEGMENTS), ROWS), leaves)
    loss.backward()
    reached = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
    torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])
    return loss.detach()


def merged_loss(base: Base, model: Any, adapter: Adapter) -> Tensor:
    """The same through dense weights."""
    dense: dict[str, Tensor] = {}
    for target in adapter.targets:
        host = base.host(target)
        weight, bias = methods.merged(adapter, target, host)
        dense[f"{target}.weight"] = weight.t() if host.shape.kind in ("conv1d", "embedding") else weight
        if bias is not None:
            dense[f"{target}.bias"] = bias
    scores = torch.func.functional_call(model, dense, (IDS,)).logits
    loss = F.cross_entropy(scores.reshape(len(LABELS), -1)[ROWS], LABELS[ROWS], reduction="sum")
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_merged_weights(name: str) -> None:
    base_name, fields = CASES[name]
    base, model = tiny.base(base_name)
    model.requires_grad_(False)
    made = fresh(base, fields)
    ours, theirs = live(made), live(made)
    torch.testing.assert_close(native_loss(base, ours), merged_loss(base, model, theirs), rtol=1e-5, atol=1e-5)
    for part, expected in zip(ours.parts, theirs.parts, strict=True):
        for tensor, tensor_expected in zip(part.tensors.values(), expected.tensors.values(), strict=True):
            if tensor.requires_grad:
                assert tensor.grad is not None and tensor_expected.grad is not None, f"{part.kind} {part.target}"
                largest = float(tensor_expected.grad.abs().max())
                torch.testing.assert_close(tensor.grad, tensor_expected.grad, rtol=1e-3, atol=1e-4 * largest)


def test_one_tensor_is_replaced_once() -> None:
    base, _ = tiny.base("llama")
    with pytest.raises(TargetError, match="two parts would replace it"):
        fresh(base, {"kind": "lora", "rank": 2, "modules_to_save": ("embed_tokens",), "trainable_tokens": (5,)})
    whole = fresh(base, {"kind": "full", "targets": ("embed_tokens",)})
    rows = fresh(base, {"kind": "token_rows", "tokens": (5,)})
    with pytest.raises(Unsupported, match=r"two parts of this adapter replace model\.embed_tokens\.weight"):
        methods.lower(replace(whole, parts=whole.parts + rows.parts), base)


def test_token_rows_on_a_tied_head_keep_its_low_rank_update() -> None:
    base, _ = tiny.base("llama-tied-mha")
    adapter = fresh(base, {"kind": "lora", "rank": 2, "targets": ("lm_head",), "trainable_tokens": (5, SEEN)})
    bank = base.bank([methods.lower(adapter, base)])
    hidden = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    table = base.decoder.embed.clone()
    rows = adapter.part("model.embed_tokens", "token_rows").tensors
    table[rows["tokens"]] = rows["rows"]
    expected = hidden @ (table + adapter.delta("lm_head")).t()
    found = base.decoder.logits(hidden, [Span(0, 4, 0)], bank)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_also_falls_on_an_update_over_a_replaced_weight() -> None:
    base, _ = tiny.base("llama")
    adapter = fresh(base, {"kind": "lora", "rank": 2, "targets": ("q_proj",), "modules_to_save": ("q_proj",)})
    plain = native_loss(base, live(adapter))
    dropped = native_loss(base, live(adapter), Dropout(0.5, torch.Generator().manual_seed(0)))
    assert not torch.equal(plain, dropped)


def test_a_replaced_norm_takes_its_bias_along() -> None:
    base, model = tiny.base("gpt2")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(48, generator=generator) for name in ("weight", "bias")}
    adapter = Adapter(methods.parse({"kind": "full"}), (Part("full", "override", "transformer.ln_f", tensors),))
    ours = live(adapter)
    found = native_loss(base, ours)
    dense = {f"transformer.ln_f.{name}": t.clone().requires_grad_() for name, t in tensors.items()}
    scores = torch.func.functional_call(model, dense, (IDS,)).logits
    loss = F.cross_entropy(scores.reshape(len(LABELS), -1)[ROWS], LABELS[ROWS], reduction="sum")
    loss.backward()
    torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=1e-5)
    for name, tensor in ours.parts[0].tensors.items():
        torch.testing.assert_close(tensor.grad, dense[f"transformer.ln_f.{name}"].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["transformer.wpe", "transformer.h.7.ln_1", "model.norm"])
def test_a_replaced_tensor_that_nothing_reads_is_refused(target: str) -> None:
    base, _ = tiny.base("gpt2")
    part = Part("full", "override", target, {"weight": torch.ones(48)})
    with pytest.raises(Unsupported, match=f"cannot replace {target}.weight"):
        native_loss(base, Adapter(methods.parse({"kind": "full"}), (part,)))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("full", "override", "transformer.wte", {"weight": torch.ones(99, 48)}), r"is \[99, 48\], the base has \[97,"),
        (Part("full", "override", "lm_head", {"weight": torch.ones(99, 48)}), r"is \[99, 48\], the base has \[97, 48\]"),
        (Part("full", "override", "transformer.ln_f", {"bias": torch.ones(32)}), r"is \[32\], the base has \[48\]"),
        (Part("full", "override", "transformer.h.0.mlp.c_fc", {"weight": torch.ones(192, 48)}), r"the base has \[48, 192\]"),
        (Part("token_rows", "override", "transformer.wte", {"rows": torch.ones(1, 32), "tokens": torch.tensor([3])}),
         r"has rows \[1, 32\], expected \[1, 48\]"),
        (Part("token_rows", "override", "transformer.wte", {"rows": torch.ones(1, 48), "tokens": torch.tensor([97])}),
         r"has rows 97 to 97, the base has 97"),
    ],
)  # fmt: skip
def test_a_replaced_tensor_of_another_size_is_refused(part: Part, message: str) -> None:
    """A head with two rows more would score tokens that the base has not, with no error from any product."""
    base, _ = tiny.base("gpt2")
    with pytest.raises(FormatError, match=message):
        native_loss(base, Adapter(methods.parse({"kind": "lora"}), (part,)))
