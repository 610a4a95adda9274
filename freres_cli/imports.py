"""Import large libraries in less time. What is put off is imported when it is first used."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SCIPY = "scipy.optimize"
COMPILER = "torch._dynamo"
SHAPES = "torch.fx.experimental.symbolic_shapes"
# The one function that is taken from each as a model of transformers is imported: for losses of object detection, for masks,
# and, by torch 2.15, for its flex attention.
PUT_OFF = {
    SCIPY: "linear_sum_assignment",
    f"{COMPILER}._trace_wrapped_higher_order_op": "TransformGetItemToIndex",
    SHAPES: "has_free_unbacked_symbols",
}
# What transformers finds in a folder of a model.
FOLDERS = "create_import_structure_from_path"
# Decorators that only tell torch.compile something.
MARKS = ("assume_constant_result", "allow_in_graph", "disable")
# Where it is installed, transformers imports torchao with every model. It warns about each of its libraries for other
# devices, and torch warns about what it registers.
NOISY = ("torchao", "torch.utils._pytree")

_is_command = False


def declare_command() -> None:
    """Say that this process runs a ``freres`` command, and nobody else's code.

    ``quick_imports`` then leaves out torch's compiler, with its algebra of shapes, and its tensors over several devices,
    which no command uses: a quarter of what ``freres ask`` takes to start. With several processes, as under torchrun, it
    leaves out nothing.
    """
    global _is_command
    _is_command = "WORLD_SIZE" not in os.environ
    sys.meta_path.insert(0, _NumpyFirst())


def is_command() -> bool:
    """Whether this process was declared to run a ``freres`` command alone."""
    return _is_command


class _NumpyFirst(MetaPathFinder):
    """Imports numpy before torch. Torch's native part would, and drops what a signal handler raises meanwhile: Ctrl-C, or
    the end of a process that is told to end."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Find nothing."""
        if fullname == "torch":
            import_module("numpy")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import inside the block without garbage collection, and without scipy, which no model of ours needs.

    An import makes many objects and nearly no garbage, so that looking for it is a seventh of the time of importing torch
    and transformers. In a process of ``declare_command``, leave out what that says, and never look at the modules again.
    transformers looks through the folders of all its models, twice, and remembers too few of them: here it remembers all.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        with (
            _put_off(SCIPY),
            without_compiler(),
            quiet_torchao(),
            _replaced(functools, "lru_cache", _remember_folders),
        ):
            yield
    finally:
        if was_collecting:
            if _is_command:
                # Modules stay until the end. Where others' code runs, this would also keep all that is garbage by then.
                gc.freeze()
            gc.enable()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside the block, leave out what ``declare_command`` says, if it was called.

    transformers finds a torch for one device, as some builds are, and keeps to that until the process ends. Marks for
    torch.compile are not set.
    """
    if not _is_command:
        yield
        return
    import torch

    with (
        _put_off(COMPILER, *(name for name in PUT_OFF if name.startswith(COMPILER))),
        _put_off(SHAPES),
        _replaced(torch.distributed, "is_available", lambda: False),
        _replaced(torch.compiler, "disable", _keep_unmarked),
    ):
        yield


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
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def _remember_folders(maxsize: Any = 128, typed: bool = False) -> Any:
    """``functools.lru_cache``, without a limit for the function ``FOLDERS``."""
    if callable(maxsize):  # the function itself
        is_of_folders = getattr(maxsize, "__name__", "") == FOLDERS
        return lru_cache(None if is_of_folders else 128)(maxsize)
    return lru_cache(maxsize, typed)


def _keep_unmarked(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return _keep_unmarked if fn is None else fn


@contextmanager
def _put_off(*names: str) -> Iterator[None]:
    """Let stand-ins take the place of these modules inside the block, unless the first is there already."""
    if names[0] in sys.modules:
        yield
        return
    stand_ins, finder = {name: _StandIn(name) for name in names}, _PartsOfWhole()
    sys.modules.update(stand_ins)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


class _StandIn(ModuleType):
    """What stands in for a module until something of it is used: a function of ``PUT_OFF`` when it is called, and any other
    name but a mark at once."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # a package, whose modules ``_PartsOfWhole`` finds
        self.__spec__ = ModuleSpec(name, None, is_package=True)  # for those who look whether it is there

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == PUT_OFF.get(self.__name__):
            return partial(call_later, self.__name__)
        if self.__name__ == COMPILER and name in MARKS:
            return _keep_unmarked
        return getattr(_import(self.__name__), name)


class _PartsOfWhole(MetaPathFinder, Loader):
    """Finds a module of a package that has a stand-in: the package itself is imported, and takes the stand-in's place."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package = fullname.rpartition(".")[0]
        if not isinstance(sys.modules.get(package), _StandIn):
            return None
        _import(package)
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._spec = (module := import_module(spec.name)).__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # it ran when its package was imported


def _import(name: str) -> ModuleType:
    """Import what a stand-in stands in for, with those that were put off together with it."""
    whole = next(first for first in (SCIPY, COMPILER, SHAPES) if name.startswith(first))
    for other in [other for other, module in sys.modules.items() if isinstance(module, _StandIn)]:
        if other.startswith(whole):
            del sys.modules[other]
    return import_module(name)


def call_later(module: str, *arguments: Any, **options: Any) -> Any:
    """Call the function of ``PUT_OFF`` in ``module``, which is imported at the first call."""
    return getattr(_import(module), PUT_OFF[module])(*arguments, **options)
