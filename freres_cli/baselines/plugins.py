"""Methods of other packages, so that comparing a new one needs no change here.

A package offers a method as an entry point of the group ``freres.methods``, under the method's own name::

    [project.entry-points."freres.methods"]
    mine = "my_package.my_method:METHOD"

``METHOD`` is a ``declaration.Method``. Its module is imported by every command, so let it import torch when it is used
(``declaration.lazy_module``).
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freres_cli.baselines.declaration import FUNCTIONS, Method
from freres_cli.errors import FreresError, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "freres.methods"


@dataclass
class Plugins:
    """What other packages offer. ``methods``: by name. ``origins``: of each, its package with the version, and a digest of
    the file that declares it: what was made by other code is not taken for its own. ``faults``: why others cannot be used, by
    name."""

    methods: dict[str, Method] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def find_plugins(taken: Container[str]) -> Plugins:
    """Return the methods of all installed packages, by name. ``taken``: names of methods that freres has itself, which none
    replaces. A package that cannot be used is a fault, and no error: commands that do not need it still run."""
    found = Plugins()
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        package = "a package"
        try:
            if point.dist is not None:
                package = f"{point.dist.name} {point.dist.version}"
            if point.name in taken or point.name in found.methods:
                raise ValueError("there is a method of that name")
            method = _check(point.load(), point)
            origin = f"{package}, sha256 {_digest(point)}"
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            found.faults[point.name] = f"{point.name} of {package} cannot be used: {reason}"
            continue
        found.methods[point.name] = _guard(method, package)
        found.origins[point.name] = origin
    return found


def _check(method: Any, point: EntryPoint) -> Method:
    """Return what an entry point leads to. Raises ``ValueError`` if that is not a method, or not one that can be added."""
    if not isinstance(method, Method) or method.name != point.name:
        raise ValueError(f"{point.value}: expected a Method named {point.name}, got {method!r:.60}")
    if method.streams or method.has_quality or method.training != "none":
        raise ValueError(f"{point.value}: streams, has_quality and training are for methods of freres")
    named = [name for name in FUNCTIONS if getattr(method, name) is not None]
    if len(named) != 1 or (named == ["compress"]) != method.makes_bundles:
        raise ValueError(f"{point.value}: expected compress, or makes_bundles=False and one function that picks")
    return method


def _digest(point: EntryPoint) -> str:
    """Of the file that declares a method, the first 16 hexadecimal digits of its SHA-256."""
    file = sys.modules[point.module].__file__
    return hashlib.sha256(b"" if file is None else Path(file).read_bytes()).hexdigest()[:16]


def _guard(method: Method, package: str) -> Method:
    """Return a method whose failures name it and its package, and whose picks are checked."""

    def guard(function: Callable[..., Any], picks: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any) -> Any:
            try:
                made = function(*given)
                if picks:
                    _check_picks(made, given[0].shape[0 if method.pick_attended is None else -1], given[-1])
            except Exception as error:
                if isinstance(error, FreresError) or is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                hint = "a fault of that package; FRERES_DEBUG=1 shows where"
                raise FreresError(f"method {method.name} of {package}: {reason}", hint) from error
            return made

        return call

    functions = {name: getattr(method, name) for name in FUNCTIONS}
    guarded: dict[str, Any] = {
        name: guard(function, name != "compress") for name, function in functions.items() if function is not None
    }
    return replace(method, **guarded)


def _check_picks(places: Tensor, num_tokens: int, count: int) -> None:
    """Raises ``ValueError`` unless ``places`` are ``count`` increasing int64 indices of ``num_tokens`` tokens."""
    if str(places.dtype) != "torch.int64" or tuple(places.shape) != (count,):
        raise ValueError(f"expected {count} places as int64, got {tuple(places.shape)} of {places.dtype}")
    if bool((places.diff() <= 0).any()) or bool(((places < 0) | (places >= num_tokens)).any()):
        raise ValueError(f"expected increasing places of {num_tokens} tokens")
