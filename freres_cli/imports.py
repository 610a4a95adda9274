"""Import large libraries in less time. Nothing is left out: what is put off is imported when it is first used."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

# transformers' losses for object detection take one function from it, and are imported with every model.
PUT_OFF = "scipy.optimize"
PUT_OFF_FUNCTION = "linear_sum_assignment"
# Where it is installed, transformers imports torchao with every model. It warns about each of its libraries for other
# devices, and torch warns about what it registers.
NOISY = ("torchao", "torch.utils._pytree")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import inside the block without garbage collection, and without scipy, which no model of ours needs.

    An import makes many objects and nearly no garbage, so that looking for it is a seventh of the time of importing torch
    and transformers.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        with _put_off_scipy(), quiet_torchao():
            yield
    finally:
        if was_collecting:
            # Modules stay until the end, so later collections need not look at them.
            gc.freeze()
            gc.enable()


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Import torchao inside the block without its warnings. Errors are shown."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    try:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _put_off_scipy() -> Iterator[None]:
    """Let ``from scipy.optimize import linear_sum_assignment`` inside the block give a function that imports it when it is
    called. Any other name is taken from scipy itself, at once."""
    if PUT_OFF in sys.modules:
        yield
        return
    sys.modules[PUT_OFF] = stand_in = _StandIn(PUT_OFF)
    try:
        yield
    finally:
        if sys.modules.get(PUT_OFF) is stand_in:
            del sys.modules[PUT_OFF]


class _StandIn(ModuleType):
    """What stands in for ``scipy.optimize`` until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return linear_sum_assignment if name == PUT_OFF_FUNCTION else getattr(_import_scipy(), name)


def _import_scipy() -> ModuleType:
    if isinstance(sys.modules.get(PUT_OFF), _StandIn):
        del sys.modules[PUT_OFF]
    return import_module(PUT_OFF)


def linear_sum_assignment(*arguments: Any, **options: Any) -> Any:
    """``scipy.optimize.linear_sum_assignment``, with scipy imported at the first call."""
    return _import_scipy().linear_sum_assignment(*arguments, **options)
