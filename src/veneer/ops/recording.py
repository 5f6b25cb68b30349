"""Whether autograd is listening. Decoding asks for nothing else, and an autograd.Function costs more than a small kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def recorded(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors has to be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def unrecorded(function: F) -> F:
    """`function` without autograd. A decoding step calls four hundred such, and nothing is recorded there anyway: then this is
    one question, where `torch.no_grad()` would switch off and on.
    """

    @wraps(function)
    def quietly(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, quietly)
