"""The laws that every method obeys on every kind of host. A new file in `methods/` is under them at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.laws.world import (
    KINDS,
    World,
    carried_out,
    fresh,
    host_of,
    inputs,
    lowered_at,
    method,
    own_parts,
    stirred,
    world,
)
from veneer.adapter import Adapter
from veneer.base.host import DenseHost, Host
from veneer.errors import Unsupported
from veneer.inits import INITS
from veneer.methods import METHODS, complete, folded, host_at, lower, merged, start_parts
from veneer.methods._lowrank import ScaledMethod
from veneer.types import BaseShape, Factors, Lowered

WEIGHT = sorted(kind for kind, cls in METHODS.items() if cls.site == "weight")
REPLACING = sorted(kind for kind, cls in METHODS.items() if cls.site == "override")
ALL = sorted(METHODS)


def on(kind: str, host_kind: str, **fields: object) -> tuple[Adapter, World]:
    """A fresh adapter of the method on a base of one kind of host, or a skip where it says that it can't."""
    base = world(host_kind)
    if host_kind == "embedding":
        if "targets" not in METHODS[kind].model_fields:
            pytest.skip("it does not choose its targets")
        fields = {**fields, "targets": ("model.embed_tokens",)}
        why = method(kind, **fields).refusal("model.embed_tokens", base.shape.hosts["model.embed_tokens"])
        if why is not None:
            pytest.skip(why)
    return fresh(method(kind, **fields), base), base


@pytest.mark.parametrize("host_kind", KINDS)
@pytest.mark.parametrize("kind", WEIGHT)
def test_a_fresh_adapter_changes_nothing_bitwise(kind: str, host_kind: str) -> None:
    adapter, base = on(kind, host_kind)
    lowered = lower(adapter, base)
    for part in own_parts(adapter):
        host = base.host(part.target)
        x = inputs(host)
        assert torch.equal(carried_out(lowered_at(lowered, part.target), x, host), carried_out((), x, host))


@pytest.mark.parametrize("host_kind", ["linear", "biased", "conv1d", "embedding"])
@pytest.mark.parametrize("kind", REPLACING)
def test_a_fresh_replacement_is_the_tensor_itself(kind: str, host_kind: str) -> None:
    adapter, base = on(kind, host_kind)
    for part in adapter.parts:
        host = base.host(part.target)
        weight, bias = merged(adapter, part.target, host)
        assert torch.equal(weight, host.weight())
        assert bias is None if host.bias is None else torch.equal(bias, host.bias)


@pytest.mark.parametrize("host_kind", KINDS)
@pytest.mark.parametrize("kind", WEIGHT)
def test_forward_is_lowered_is_merged(kind: str, host_kind: str) -> None:
    adapter, base = on(kind, host_kind)
    adapter = stirred(adapter)
    lowered = lower(adapter, base)
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if host_kind == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    for part in own_parts(adapter):
        host = base.host(part.target)
        x = inputs(host)
        spec = adapter.spec
        forward = spec.forward(x, complete(adapter, part), host)
        weight, bias = merged(adapter, part.target, host)
        if host.shape.kind == "embedding":
            dense = F.embedding(x, weight.t())
        else:
            dense = F.linear(x.float(), weight, None if bias is None else bias.float())
        torch.testing.assert_close(forward.float(), dense, **tolerance)
        torch.testing.assert_close(carried_out(lowered_at(lowered, part.target), x, host).float(), dense, **tolerance)
        assert not torch.equal(dense, host.apply(x).float()), "the law must be tried on an adapter that does something"


def sizes(rank: int, out: int, inp: int) -> dict[str, int]:
    """What fits a layer of this size, for whichever method asks."""
    rank = min(rank, out, inp)
    return {"rank": rank, "target_rank": min(rank, 2), "block": next(b for b in (4, 3, 2, inp) if inp % b == 0)}


@pytest.mark.parametrize("kind", WEIGHT)
@given(out=st.integers(2, 13), inp=st.integers(2, 13), rank=st.integers(1, 13), rows=st.integers(1, 4), data=st.data())
def test_the_same_law_at_any_size(kind: str, out: int, inp: int, rank: int, rows: int, data: st.DataObject) -> None:
    """Every method on a layer of any size, at any rank that fits, and whatever its name says about its side."""
    host_kind = data.draw(st.sampled_from(["linear", "biased", "conv1d"]))
    target = data.draw(st.sampled_from(["model.layers.3.mlp.down_proj", "model.layers.3.self_attn.k_proj", "head"]))
    host = host_of(host_kind, out, inp, seed=out * 100 + inp)
    spec = method(kind, **{k: v for k, v in sizes(rank, out, inp).items() if k in METHODS[kind].model_fields})
    if spec.refusal(target, host.shape) is not None:
        spec = spec.model_copy(update={"rank": out * inp // (out + inp)})  # a sparse update has a limit of its own
        assert spec.refusal(target, host.shape) is None
    base = World(BaseShape(0, 0, 0, 0, 0, 0, {target: host.shape}), {target: host})
    scale = (
        spec.scale(target, spec.rank_at(target))
        if spec.rank_at(target) and issubclass(METHODS[kind], ScaledMethod)
        else 1.0
    )

    def factors(name: str, on: Host, generator: torch.Generator) -> Factors:
        return INITS["default"](on, spec.rank_at(name) or 1, scale, None, generator)

    parts = start_parts(spec, [target], base, torch.Generator().manual_seed(rank), factors)
    adapter = stirred(Adapter(spec, parts), seed=rank)
    x = inputs(host, rows=rows)
    weight, bias = merged(adapter, target, host)
    dense = F.linear(x, weight, bias)
    whole = complete(adapter, adapter.part(target))
    torch.testing.assert_close(spec.forward(x, whole, host), dense, rtol=1e-4, atol=1e-4)
    primitives = lowered_at(lower(adapter, base), target)
    torch.testing.assert_close(carried_out(primitives, x, host), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("host_kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("kind", sorted(set(WEIGHT) - {"dora"}))  # DoRA holds its norm constant on purpose
def test_gradients_are_the_numerical_ones_in_fp64(kind: str, host_kind: str) -> None:
    """Of the definition and of the lowered form, in every trained tensor of a part."""
    adapter, base = on(kind, host_kind)
    adapter = stirred(adapter).map_tensors(lambda t: t.double() if t.is_floating_point() else t)
    part = own_parts(adapter)[0]
    whole, plain = complete(adapter, part), base.host(part.target)
    stored = plain.weight().t() if host_kind != "linear" else plain.weight()
    host = DenseHost(stored.double(), None if plain.bias is None else plain.bias.double(), kind=plain.shape.kind)
    x = inputs(host)
    trained = [n for n, t in part.tensors.items() if n not in adapter.spec.frozen() and t.is_floating_point()]

    def output(*values: torch.Tensor) -> torch.Tensor:
        moved = replace(whole, tensors={**whole.tensors, **dict(zip(trained, values, strict=True))})
        once = World(base.shape, {part.target: host})
        lowered = adapter.spec.lower_into(Lowered(), moved, once)
        by_definition = adapter.spec.forward(x, moved, host)
        as_run = carried_out(lowered_at(lowered, part.target), x, host)
        torch.testing.assert_close(as_run, by_definition, rtol=1e-9, atol=1e-9)
        return torch.stack([by_definition.sin().sum(), as_run.sin().sum()])

    assert torch.autograd.gradcheck(output, [whole.tensors[n].clone().requires_grad_() for n in trained])


@pytest.mark.parametrize("host_kind", ["linear", "biased", "conv1d", "embedding"])
@pytest.mark.parametrize("kind", REPLACING)
def test_forward_is_merged_for_replacements(kind: str, host_kind: str) -> None:
    adapter, base = on(kind, host_kind)
    adapter = stirred(adapter)
    overrides = lower(adapter, base).overrides
    for part in adapter.parts:
        host = base.host(part.target)
        x = inputs(host)
        weight, bias = merged(adapter, part.target, host)
        dense = F.embedding(x, weight.t()) if host.shape.kind == "embedding" else F.linear(x, weight, bias)
        torch.testing.assert_close(METHODS[part.kind]().forward(x, part, host), dense)
        override = overrides[f"{part.target}.weight"]
        stored = weight.t() if host.shape.kind in ("conv1d", "embedding") else weight
        kept = stored if override.rows is None else stored[override.rows]
        assert torch.equal(override.value, kept)


@pytest.mark.parametrize("kind", ALL)
def test_what_is_stored_is_what_was_declared(kind: str) -> None:
    base = world()
    adapter = fresh(method(kind), base)
    count = 0
    for part in adapter.parts:
        if part.target is None and part.site == "weight":
            count += part.num_parameters
            continue
        host = host_at(part.site, part.target or "", base)
        declared = adapter.spec.tensor_shapes(part.target or "", host.shape)
        assert {name: tuple(t.shape) for name, t in part.tensors.items()} == declared
        assert adapter.spec.frozen() >= {name for name, t in part.tensors.items() if not t.is_floating_point()}
        count += sum(torch.Size(size).numel() for size in declared.values())
    assert adapter.num_parameters == count


@pytest.mark.parametrize("kind", ALL)
def test_the_docs_have_a_row_for_it(kind: str) -> None:
    assert METHODS[kind].summary and METHODS[kind].use and METHODS[kind].limits


@pytest.mark.parametrize("kind", ALL)
def test_a_file_gives_back_the_same_adapter(kind: str, tmp_path: Path) -> None:
    adapter = stirred(fresh(method(kind), world()))
    kept = folded(adapter)
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert again.digest == kept.digest
    assert [(p.kind, p.site, p.target, p.host) for p in again.parts] == [
        (p.kind, p.site, p.target, p.host) for p in kept.parts
    ]
    assert type(again.spec) is type(adapter.spec)
    again.save(tmp_path / "b")
    for name in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "bottleneck"])
def test_a_file_keeps_the_dtype(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = fresh(method(kind), world()).map_tensors(lambda t: t.to(dtype))
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert {t.dtype for p in again.parts for t in p.tensors.values()} == {dtype}
    assert again.digest == adapter.digest


@pytest.mark.parametrize("kind", ALL)
def test_folding_keeps_the_function_and_is_done_once(kind: str) -> None:
    base = world()
    adapter = stirred(fresh(method(kind), base))
    once = folded(adapter)
    before, after = lower(adapter, base), lower(once, base)
    assert before.weights.keys() == after.weights.keys()
    if before.tokens is not None:
        assert torch.equal(before.tokens.rows, after.tokens.rows)
    for layer, kv in before.kv.items():
        assert torch.equal(kv.key, after.kv[layer].key) and torch.equal(kv.value, after.kv[layer].value)
    assert folded(once).digest == once.digest


@pytest.mark.parametrize("kind", sorted(k for k, cls in METHODS.items() if issubclass(cls, ScaledMethod)))
def test_scaled_multiplies_the_scale_exactly(kind: str) -> None:
    base = world()
    adapter = fresh(method(kind, alpha_pattern={"down_proj": 7.0}), base)
    half = adapter.scaled(0.5)
    for target in adapter.targets:
        assert half.scale(target) == 0.5 * adapter.scale(target)
    if kind == "lora":
        moved = stirred(adapter)
        for target in moved.targets:
            torch.testing.assert_close(moved.scaled(0.5).delta(target), 0.5 * moved.delta(target))


@pytest.mark.parametrize("kind", sorted(k for k, cls in METHODS.items() if not issubclass(cls, ScaledMethod)))
def test_a_method_without_a_scale_says_so(kind: str) -> None:
    adapter = fresh(method(kind), world())
    with pytest.raises(Unsupported, match="cannot be scaled"):
        adapter.scaled(0.5)


@pytest.mark.parametrize("kind", ALL)
def test_what_cannot_be_merged_says_why(kind: str) -> None:
    base = world()
    adapter = fresh(method(kind), base)
    if adapter.spec.site in ("weight", "override"):
        return
    part = adapter.parts[0]
    with pytest.raises(Unsupported, match=f"{kind} cannot be merged into a weight: "):
        adapter.spec.merged(part, host_at(part.site, part.target or "", base))


def trainable(adapter: Adapter) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The adapter on leaves that collect gradients, and the leaves by name."""
    leaves: dict[str, torch.Tensor] = {}
    parts = []
    for part in adapter.parts:
        tensors = {}
        for name, tensor in part.tensors.items():
            trained = name not in adapter.spec.frozen() and tensor.is_floating_point()
            tensors[name] = tensor.clone().requires_grad_(trained)
            if trained:
                leaves[f"{part.target} {name}"] = tensors[name]
        parts.append(replace(part, tensors=tensors))
    return replace(adapter, parts=tuple(parts)), leaves


def something_of(lowered: Lowered, base: World) -> torch.Tensor:
    """A number that depends on every tensor in every primitive."""
    total = torch.zeros(())
    for target, primitives in lowered.weights.items():
        total = total + carried_out(primitives, inputs(base.host(target)), base.host(target)).sin().sum()
    loose = [*lowered.overrides.values(), *lowered.kv.values(), *(n for b in lowered.sublayers.values() for n in b)]
    loose += [] if lowered.tokens is None else [lowered.tokens]
    for primitive in loose:
        tensors = [v for v in vars(primitive).values() if isinstance(v, torch.Tensor) and v.requires_grad]
        total = total + sum(t.sin().sum() for t in tensors)
    return total


@pytest.mark.parametrize("kind", ALL)
def test_training_tensors_get_gradients_and_the_base_gets_none(kind: str) -> None:
    base = world()
    adapter, leaves = trainable(stirred(fresh(method(kind), base)))
    before = {path: host.weight().clone() for path, host in base.hosts.items()}
    something_of(lower(adapter, base), base).backward()
    assert leaves
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0, name
    for path, host in base.hosts.items():
        assert torch.equal(host.weight(), before[path]) and not host.weight().requires_grad
