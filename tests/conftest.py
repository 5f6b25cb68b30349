"""What every test may rely on: no network, one torch thread, a cache of its own, one set of hypothesis settings."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shapes in the annotations of the kernels are checked at every call. Must come before the first import of veneer.ops.
install_import_hook("veneer.ops", "beartype.beartype")

# Time limits on single examples fail on a busy machine and say nothing about the code.
settings.register_profile("veneer", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("veneer"), max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "veneer"))


_caches: list[tempfile.TemporaryDirectory[str]] = []


def pytest_configure(config: pytest.Config) -> None:
    """Converted bases go to a folder that lives as long as the run and is shared by its workers.

    Set VENEER_CACHE to keep it from run to run.
    """
    if "VENEER_CACHE" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="veneer-tests-")
        _caches.append(cache)
        os.environ["VENEER_CACHE"] = cache.name


def pytest_unconfigure(config: pytest.Config) -> None:
    while _caches:
        os.environ.pop("VENEER_CACHE", None)
        _caches.pop().cleanup()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Workers share the cores, and sums in a fixed order make failures repeatable."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _event_loop() -> Iterator[None]:
    """One for whoever asks this thread for its own: a library that makes one never closes it, which fails some later test."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()
