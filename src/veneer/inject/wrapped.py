"""Modules with the parts of one adapter around them, by each method's own definition.

`AdaptedLayer` wraps a linear layer, Conv1D, convolution or embedding; `AdaptedModule` any other: a norm whose tensors are
replaced, or a sublayer with a bottleneck on its output. The wrapped module stays inside, untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapter import Part
from veneer.base.host import Host
from veneer.errors import Unsupported
from veneer.methods import Method, Place
from veneer.types import HostShape

Bound = tuple[Method, Part]


class Adapted(nn.Module):
    """A frozen module and the live tensors of its parts. `shared` are tensors that all parts of the adapter have in common."""

    def __init__(self, layer: nn.Module, methods: Sequence[Bound], shared: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.training = layer.training
        self.methods = tuple(methods)
        self.shared = dict(shared)
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

    def live(self) -> list[Bound]:
        """Each method with its part, present and shared tensors in it."""
        if self.shared and self.tensors:  # they follow the live ones where the model is moved or cast
            like = next(iter(self.tensors.values()))
            self.shared = {name: t.to(like) if t.is_floating_point() else t for name, t in self.shared.items()}
        return [
            (method, replace(part, tensors={**self.shared, **part.tensors}))
            for (method, _), part in zip(self.methods, self.parts(), strict=True)
        ]


class AdaptedLayer(Adapted):
    """A layer with a host: replaced tensors first, then each part on the output of the one before.

    host   makes a host of the layer
    scale  what the layer multiplies its output by, as some embeddings do
    tied   the table `[rows, width]` of an embedding that reads the same tensor, where an adapter replaces rows there
    """

    def __init__(
        self,
        layer: nn.Module,
        host: Callable[[nn.Module], Host],
        methods: Sequence[Bound],
        shared: Mapping[str, Tensor],
        *,
        scale: Tensor | float | None = None,
    ) -> None:
        super().__init__(layer, sorted(methods, key=lambda bound: bound[1].site != "override"), shared)
        self._host, self.scale = host, scale
        self._seen = self._state(), host(layer)
        self.tied: Callable[[], Tensor] | None = None

    @property
    def host(self) -> Host:
        """The layer as a host, made anew where the model was moved, cast or loaded since."""
        state = self._state()
        if state != self._seen[0]:
            self._seen = state, self._host(self.layer)
        return self._seen[1]

    def _state(self) -> tuple[Any, ...]:
        weight = self.weight
        return weight.data_ptr(), weight.dtype, weight.device, weight._version

    @property
    def replaces(self) -> bool:
        """Whether a part brings a weight of its own."""
        return any(part.site == "override" for _, part in self.methods)

    def table(self) -> Tensor:
        """An embedding's rows `[rows, width]` with what replaces them in place."""
        host = self.host
        for method, part in self.live():
            if part.site == "override":
                host = _Replaced(host, *method.merged(part, host))
        return host.weight().t()

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that look at their layers' dtype."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.layer.bias
        return bias if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            bare: Tensor = self.layer(x)
            return bare
        host = self._untied()
        output = None
        for method, part in self.live():
            rate = float(dict(method).get("dropout", 0.0)) if self.training else 0.0
            output = _dropped(method, x, part, host, rate) if rate else method.forward(x, part, host)
            replaces = part.site == "override"
            host = _Replaced(host, *method.merged(part, host)) if replaces else _Around(host, output)
        output = host.apply(x) if output is None else output
        if self.scale is None:
            return output
        return output * (self.scale.to(output.dtype) if isinstance(self.scale, Tensor) else self.scale)

    def _untied(self) -> Host:
        """The layer's host, on the table that the adapter gives the embedding it is tied to."""
        if self.tied is None:
            return self.host
        table = self.tied()
        return _Replaced(self.host, table.t() if self.host.shape.kind == "embedding" else table, self.host.bias)


def _dropped(method: Method, x: Tensor, part: Part, host: Host, rate: float) -> Tensor:
    """The layer's output where what the method adds to it sees an input with dropout, and the layer itself does not."""
    if host.shape.kind == "embedding":
        return method.forward(x, part, host)
    dropped = F.dropout(x, rate)
    return host.apply(x) + (method.forward(dropped, part, host) - host.apply(dropped))


class AdaptedModule(Adapted):
    """Any module: its own tensors replaced (`full`), or a bottleneck on what it returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.layer(*args, **kwargs)
        live = self.live()
        replaced = {name: t for _, part in live if part.site == "override" for name, t in part.tensors.items()}
        output = (
            torch.func.functional_call(self.layer, replaced, args, kwargs) if replaced else self.layer(*args, **kwargs)
        )
        for method, part in live:
            if part.site == "sublayer":
                output = _on_output(method, part, output, args, kwargs)
        return output


def _on_output(method: Method, part: Part, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The module's output (the first one, if it returns several) after the bottleneck."""
    h = output[0] if isinstance(output, tuple) else output
    x = h
    if method.model_dump().get("style") == "parallel":
        source = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        if not isinstance(source, Tensor) or source.shape != h.shape:
            raise Unsupported(f"'{part.target}' has no input of its output's shape, so nothing can run parallel to it")
        x = torch.stack([source, h])
    h = method.forward(x, part, Place(HostShape("sublayer", h.shape[-1], h.shape[-1])))
    return (h, *output[1:]) if isinstance(output, tuple) else h


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

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._inner.product(x, weight, bias)

    def mix(self, y: Tensor, matrix: Tensor) -> Tensor:
        return self._inner.mix(y, matrix)

    def feature(self, vector: Tensor) -> Tensor:
        return self._inner.feature(vector)


class _Replaced(_Around):
    """A host whose weight and bias an adapter brings."""

    def __init__(self, inner: Host, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(inner, weight)
        self._weight, self.bias = weight.to(inner.dtype), None if bias is None else bias.to(inner.dtype)

    def weight(self) -> Tensor:
        return self._weight

    def apply(self, x: Tensor) -> Tensor:
        return Host.apply(self, x)


def _key(part: Part, name: str) -> str:
    return f"{part.kind}_{name}"
