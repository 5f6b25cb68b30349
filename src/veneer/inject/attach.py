"""Adapters on any torch module, by the definition: `attach(model, adapter)`, and the native `attached(base, adapter)`.

A targeted layer is replaced by an `Adapted` one that runs the method's `forward` around it; `detach` puts the layer back. This
path is slower than the native decoder and takes any `nn.Module`: linear layers, convolutions, embeddings and GPT-2's Conv1D,
modules whose tensors are replaced, and bottlenecks on the output of modules named by the user.

The base is never changed: its tensors stay frozen while attached, and their `requires_grad` flags come back on detach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from veneer.adapter import Adapter, Part
from veneer.base.host import ConvHost, DenseHost, Host
from veneer.errors import Conflict, NotFound, TargetError, Unsupported, listed
from veneer.inject.wrapped import Adapted, AdaptedLayer, AdaptedModule, Bound
from veneer.methods import Method, completed, method_of
from veneer.registry import did_you_mean
from veneer.types import BaseShape, HostKind, HostShape


class ModuleSource:
    """Any `nn.Module` seen as a base: its adaptable layers by module path, in registration order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {path: m for path, m in model.named_modules() if host_kind(m) is not None}
        hosts = {path: _shape(module) for path, module in self.layers.items()}
        head = _head_path(model)
        self.shape = BaseShape(0, 0, 0, 0, 0, 0, hosts, head=head)

    def host(self, target: str) -> Host:
        if target not in self.layers:
            raise NotFound(
                f"the model has no adaptable layer called '{target}'", help=did_you_mean(target, list(self.layers))
            )
        return module_host(self.layers[target])


def host_kind(module: nn.Module) -> HostKind | None:
    """The kind of host a module is, or None where no adapter fits."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return None


def module_host(module: nn.Module) -> Host:
    """The host of a layer: a view of its frozen weight."""
    kind = host_kind(module)
    assert kind is not None
    weight, bias = _weight(module), module.bias if kind != "embedding" else None
    if not weight.is_floating_point():
        raise Unsupported(
            f"a {type(module).__name__} stores {weight.dtype}, not numbers that an adapter can be trained around",
            help='load the base in 16 bit, or natively with quantize="nf4"',
        )
    _check_product(module, kind)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvHost(module)
    return DenseHost(weight.detach(), bias.detach() if isinstance(bias, Tensor) else None, kind=kind)


def _check_product(module: nn.Module, kind: HostKind) -> None:
    """Refuse a layer that computes something else than its kind does, which an adapter around its weight would leave out."""
    plain = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    of_kind = next((c for c in plain if isinstance(module, c)), type(module))
    own = type(module).forward is not of_kind.forward and output_scale(module) is None
    if own or (isinstance(module, nn.Embedding) and module.max_norm is not None):
        what = "a forward of its own" if own else "max_norm, so it changes its table as it is read"
        raise Unsupported(
            f"a {type(module).__name__} has {what}: what an adapter adds to its weight is not known",
            help=f"leave these layers out of `targets`, or put a plain {of_kind.__name__} in their place",
        )


def output_scale(module: nn.Module) -> Tensor | float | None:
    """What an embedding multiplies its rows by (Gemma's and BART's sqrt(hidden)); None where it has no such number."""
    scale = getattr(module, "embed_scale", None)
    return scale if isinstance(module, nn.Embedding) and isinstance(scale, Tensor | float | int) else None


_HELD: MutableMapping[Tensor, tuple[bool, int]] = WeakTensorKeyDictionary()
"""Frozen tensor -> whether it was trained before the first adapter came, and how many adapters hold it frozen."""


class Handle:
    """An adapter attached to a module: its trainable tensors, and the way back."""

    def __init__(self, model: nn.Module, adapter: Adapter, layers: Mapping[str, Adapted]) -> None:
        self.model, self._adapter, self.layers = model, adapter, layers
        self._places = _places(model, layers)
        self._frozen = _base_parameters(model)
        for parameter in self._frozen:
            before, holders = _HELD.get(parameter, (parameter.requires_grad, 0))
            _HELD[parameter] = before, holders + 1
            parameter.requires_grad_(False)
        for parent, name, adapted in self._places:
            setattr(parent, name, adapted)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's tensors that are trained."""
        return [p for layer in self.layers.values() for p in layer.tensors.values() if p.requires_grad]

    def adapter(self) -> Adapter:
        """The adapter as it is now, a value of its own."""
        parts = [part for part in self._adapter.parts if part.target is None]
        parts += [part for layer in self.layers.values() for part in layer.parts()]
        order = {(p.target, p.kind): i for i, p in enumerate(self._adapter.parts)}
        parts.sort(key=lambda p: order[p.target, p.kind])
        return replace(self._adapter, parts=tuple(parts)).map_tensors(lambda t: t.detach().clone())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare base, bitwise, inside the `with` block."""
        before = [(layer, layer.enabled) for layer in self.layers.values()]
        for layer, _ in before:
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in before:
                layer.enabled = enabled

    def detach(self) -> None:
        """Put the base's own layers back. With the last adapter gone the module is as it was, flags included."""
        for parent, name, adapted in self._places:
            setattr(parent, name, adapted.layer)
        for parameter in self._frozen:
            before, holders = _HELD.pop(parameter)
            if holders == 1:
                parameter.requires_grad_(before)
            else:
                _HELD[parameter] = before, holders - 1
        self._places, self._frozen = [], []


def attach(model: nn.Module, adapter: Adapter) -> Handle:
    """Put `adapter` on any module whose layers it names. One TargetError lists everything that does not fit."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted) and path in adapter.targets:
            raise Conflict(f"'{path}' already carries an adapter", help="detach the first one")
    source = ModuleSource(model)
    by_target: dict[str, list[Bound]] = {}
    shared: dict[str, Tensor] = {}
    problems: list[str] = []
    for part in completed(adapter, source).parts:
        if part.site in ("tokens", "kv"):
            raise Unsupported(
                f"{part.kind} acts on {part.site}, which a plain module does not offer",
                help="load the base natively with vn.load_base, or choose a method on weights (lora, dora, ia3, vera)",
            )
        if part.target is None:
            shared.update(part.tensors)
            continue
        method = method_of(adapter, part)
        problems += _place_problems(model, source, method, part)
        by_target.setdefault(part.target, []).append((method, part))
    if problems:
        raise TargetError(f"this adapter does not fit the model:\n{listed(problems)}")
    layers: dict[str, Adapted] = {}
    for path, methods in by_target.items():
        layer = model.get_submodule(path)
        on_host = host_kind(layer) is not None and all(part.site != "sublayer" for _, part in methods)
        layers[path] = (
            AdaptedLayer(layer, module_host, methods, shared, scale=output_scale(layer))
            if on_host
            else AdaptedModule(layer, methods, {})
        )
    _share_tables(model, source, layers)
    return Handle(model, adapter, layers)


def _share_tables(model: nn.Module, source: ModuleSource, layers: dict[str, Adapted]) -> None:
    """What replaces rows of an embedding replaces them for all that read the same tensor: a tied head, a second embedding."""
    for adapted in list(layers.values()):
        if not (isinstance(adapted, AdaptedLayer) and adapted.replaces and isinstance(adapted.layer, nn.Embedding)):
            continue
        for path, module in source.layers.items():
            if module is adapted.layer or module.weight is not adapted.layer.weight:
                continue
            if isinstance(model.get_submodule(path.rpartition(".")[0]), Adapted):
                raise Conflict(f"'{path}' reads the table that this adapter changes, and carries one already")
            reader = layers.get(path) or AdaptedLayer(module, module_host, (), {}, scale=output_scale(module))
            assert isinstance(reader, AdaptedLayer)
            if not reader.replaces:
                reader.tied, layers[path] = adapted.table, reader


def _place_problems(model: nn.Module, source: ModuleSource, method: Method, part: Part) -> list[str]:
    """Why this part cannot stand where it says, line by line."""
    assert part.target is not None
    shape = source.shape.hosts.get(part.target)
    if shape is not None and part.site == "weight":
        return _misfits(method, part, shape)
    if part.site == "weight" or part.target not in dict(model.named_modules()):
        known = did_you_mean(part.target, list(source.shape.hosts))
        return [f"'{part.target}' is not a layer of this model; {known}"]
    if part.kind == "token_rows" and shape is not None:
        return _row_problems(part, shape)
    if part.kind != "full":
        return []
    own = dict(model.get_submodule(part.target).named_parameters(recurse=False))
    return [
        f"{part.target}: {name} is {list(t.shape)}, the layer has {list(own[name].shape) if name in own else 'none'}"
        for name, t in part.tensors.items()
        if name not in own or own[name].shape != t.shape
    ]


def _row_problems(part: Part, shape: HostShape) -> list[str]:
    """Rows of an embedding `[vocab, hidden]` that it does not have."""
    tokens, rows = part.tensors["tokens"], part.tensors["rows"]
    problems = []
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < shape.in_features:
        spread = f"{int(tokens.min())} to {int(tokens.max())}"
        problems.append(f"{part.target} has {shape.in_features} rows, the adapter replaces {spread}")
    if (expected := [tokens.numel(), shape.out_features]) != list(rows.shape):
        problems.append(f"{part.target}: rows is {list(rows.shape)}, expected {expected}")
    return problems


def _misfits(method: Method, part: Part, shape: HostShape) -> list[str]:
    assert part.target is not None
    declared = method.tensor_shapes(part.target, shape)
    problems = []
    for name, tensor in part.tensors.items():
        if name == "A" and "A" in declared and tensor.shape[1:] != tuple(declared["A"][1:]):
            takes = f"{shape.in_features} inputs" if not shape.kernel else f"{list(declared['A'][1:])} patches"
            problems.append(f"{part.target}: A is {list(tensor.shape)}, the layer takes {takes}")
        if name == "B" and tensor.shape[0] != shape.out_features:
            problems.append(f"{part.target}: B is {list(tensor.shape)}, the layer has {shape.out_features} outputs")
    for name, size in declared.items():
        if name not in ("A", "B") and name in part.tensors and tuple(part.tensors[name].shape) != tuple(size):
            problems.append(f"{part.target}: {name} is {list(part.tensors[name].shape)}, expected {list(size)}")
    return problems


def _shape(module: nn.Module) -> HostShape:
    kind = host_kind(module)
    assert kind is not None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvHost(module).shape
    if isinstance(module, nn.Linear):  # a packed weight has another shape than the layer
        return HostShape(kind, module.in_features, module.out_features, module.bias is not None)
    rows, columns = _weight(module).shape
    return HostShape(kind, rows, columns, kind == "conv1d")


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _head_path(model: nn.Module) -> str:
    """Where the output head is, for transformers models; a plain module has none that we could tell."""
    import sys

    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return ""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), "") if head is not None else ""


def _base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that belong to no adapter."""
    adapted = [module for module in model.modules() if isinstance(module, Adapted)]
    own = {id(parameter) for module in adapted for parameter in module.tensors.values()}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def _places(model: nn.Module, layers: Mapping[str, Adapted]) -> list[tuple[nn.Module, str, Adapted]]:
    """Every parent and name under which the model has these layers: a shared one is adapted wherever it is called."""
    adapted = {id(layer.layer): layer for layer in layers.values()}
    paths = {path: adapted[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in adapted}
    split = [(*path.rpartition("."), layer) for path, layer in paths.items()]
    return [(model.get_submodule(parent), name, layer) for parent, _, name, layer in split]
