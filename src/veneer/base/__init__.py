"""The frozen base, one layer at a time: a `Host` is what a method may know of it."""

from veneer.base.host import DenseHost, Host

__all__ = ["DenseHost", "Host"]
