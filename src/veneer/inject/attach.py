"""Adapters on any torch module, by the definition: `attach(model, adapter)`, and the native `attached(base, adapter)`.

A targeted layer is replaced by an `AdaptedLayer` that runs the method's `forward` around it; `detach` puts the layer back. This
path is slower than the native decoder and takes any `nn.Module`: linear layers, embeddings and GPT-2's Conv1D, wherever they are.

The base is never changed: its tensors stay frozen while attached, and their `requires_grad` flags come back on detach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Part
from veneer.base.host import DenseHost, Host
from veneer.errors import Conflict, NotFound, TargetError, Unsupported, listed
from veneer.methods import Method, method_of
from veneer.registry import did_you_mean
from veneer.types import BaseShape, HostKind, HostShape


class ModuleSource:
    """Any `nn.Module` seen as a base: its adaptable layers by module path, in registration order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layers = {path: m for path, m in model.named_modules() if host_kind(m) is not None}
        hosts = {path: _shape(module) for path, module in self._layers.items()}
        head = _head_path(model)
        self.shape = BaseShape(0, 0, 0, 0, 0, 0, hosts, head=head)

    def host(self, target: str) -> Host:
        if target not in self._layers:
            raise NotFound(
                f"the model has no adaptable layer called '{target}'", help=did_you_mean(target, list(self._layers))
            )
        return module_host(self._layers[target])


def host_kind(module: nn.Module) -> HostKind | None:
    """The kind of host a module is, or None where no adapter fits."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
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
    return DenseHost(weight.detach(), bias.detach() if isinstance(bias, Tensor) else None, kind=kind)


class AdaptedLayer(nn.Module):
    """A frozen layer with the parts of one adapter around it."""

    def __init__(self, layer: nn.Module, methods: list[tuple[Method, Part]]) -> None:
        super().__init__()
        self.layer = layer
        self.host = module_host(layer)
        self.methods = methods
        self.enabled = True
        self.tensors = nn.ParameterDict()
        for method, part in methods:
            for name, value in part.tensors.items():
                trained = name not in method.frozen() and value.is_floating_point()
                self.tensors[_key(part, name)] = nn.Parameter(value.clone(), requires_grad=trained)

    def parts(self) -> list[Part]:
        """The parts with their present tensors."""
        return [
            replace(part, tensors={name: self.tensors[_key(part, name)] for name in part.tensors})
            for _, part in self.methods
        ]

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that look at their layers' dtype."""
        return _weight(self.layer)

    @property
    def bias(self) -> Tensor | None:
        bias = self.layer.bias
        return bias if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            bare: Tensor = self.layer(x)
            return bare
        host = self.host
        for (method, _), part in zip(self.methods, self.parts(), strict=True):
            output = method.forward(x, part, host)
            host = _Around(self.host, output)
        return output


class _Around(Host):
    """A host whose product is already known: a second part on one layer adds to the first's output."""

    def __init__(self, inner: Host, output: Tensor) -> None:
        self._inner, self._output = inner, output
        self.shape, self.bias = inner.shape, inner.bias

    @property
    def dtype(self) -> torch.dtype:
        return self._inner.dtype

    @property
    def device(self) -> torch.device:
        return self._inner.device

    def weight(self) -> Tensor:
        return self._inner.weight()

    def apply(self, x: Tensor) -> Tensor:
        return self._output


class Handle:
    """An adapter attached to a module: its trainable tensors, and the way back."""

    def __init__(self, model: nn.Module, adapter: Adapter, layers: Mapping[str, AdaptedLayer]) -> None:
        self.model, self._adapter, self.layers = model, adapter, layers
        self._flags = [(p, p.requires_grad) for p in _base_parameters(model, layers)]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's tensors that are trained."""
        return [p for layer in self.layers.values() for p in layer.tensors.values() if p.requires_grad]

    def adapter(self) -> Adapter:
        """The adapter as it is now, a value of its own."""
        parts = [part for layer in self.layers.values() for part in layer.parts()]
        order = {(p.target, p.kind): i for i, p in enumerate(self._adapter.parts)}
        parts.sort(key=lambda p: order[p.target, p.kind])
        return replace(self._adapter, parts=tuple(parts)).map_tensors(lambda t: t.detach().clone())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare base, bitwise, inside the `with` block."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True

    def detach(self) -> None:
        """Put the base's own layers back. The module is as it was, flags included."""
        for path, layer in self.layers.items():
            _put(self.model, path, layer.layer)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def attach(model: nn.Module, adapter: Adapter) -> Handle:
    """Put `adapter` on any module whose layers it names. One TargetError lists everything that does not fit."""
    source = ModuleSource(model)
    by_target: dict[str, list[tuple[Method, Part]]] = {}
    problems: list[str] = []
    for part in adapter.parts:
        if part.site != "weight":
            raise Unsupported(
                f"{part.kind} acts on {part.site}, which a plain module does not offer",
                help="load the base natively with vn.load_base, or choose a method on weights (lora, dora, ia3, vera)",
            )
        method = method_of(adapter, part)
        assert part.target is not None
        shape = source.shape.hosts.get(part.target)
        if shape is None:
            known = did_you_mean(part.target, list(source.shape.hosts))
            problems.append(f"'{part.target}' is not a layer of this model; {known}")
        else:
            problems += _misfits(method, part, shape)
        by_target.setdefault(part.target, []).append((method, part))
    if problems:
        raise TargetError(f"this adapter does not fit the model:\n{listed(problems)}")
    layers: dict[str, AdaptedLayer] = {}
    for path, methods in by_target.items():
        layer = model.get_submodule(path)
        if isinstance(layer, AdaptedLayer):
            raise Conflict(f"'{path}' already carries an adapter", help="detach the first one")
        layers[path] = AdaptedLayer(layer, methods)
    handle = Handle(model, adapter, layers)
    for path, adapted in layers.items():
        _put(model, path, adapted)
    return handle


def _misfits(method: Method, part: Part, shape: HostShape) -> list[str]:
    assert part.target is not None
    problems = []
    for name, tensor in part.tensors.items():
        if name == "A" and tensor.shape[1] != shape.in_features:
            problems.append(f"{part.target}: A is {list(tensor.shape)}, the layer takes {shape.in_features} inputs")
        if name == "B" and tensor.shape[0] != shape.out_features:
            problems.append(f"{part.target}: B is {list(tensor.shape)}, the layer has {shape.out_features} outputs")
    return problems


def _shape(module: nn.Module) -> HostShape:
    kind = host_kind(module)
    assert kind is not None
    rows, columns = _weight(module).shape
    if kind == "linear":
        return HostShape(kind, columns, rows, module.bias is not None)
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


def _base_parameters(model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> list[nn.Parameter]:
    own = {id(p) for layer in layers.values() for p in layer.tensors.values()}
    return [p for p in model.parameters() if id(p) not in own]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _key(part: Part, name: str) -> str:
    return f"{part.kind}_{name}"
