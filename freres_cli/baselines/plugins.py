"""Methods of other packages, so that comparing a new one needs no change here.

A package offers a method as an entry point of the group ``freres.methods``, under the method's own name::

    [project.entry-points."freres.methods"]
    mine = "my_package.my_method:METHOD"

``METHOD`` is a ``declaration.Method``. Its module is imported by every command, so let it import torch when it is used
(``declaration.lazy_module``).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Container
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from freres_cli.baselines.declaration import Method

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
        package = "a package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        try:
            if point.name in taken or point.name in found.methods:
                raise ValueError("there is a method of that name")
            method = point.load()
            if not isinstance(method, Method) or method.name != point.name:
                raise ValueError(f"{point.value}: expected a Method named {point.name}, got {method!r:.60}")
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            found.faults[point.name] = f"{point.name} of {package} cannot be used: {reason}"
            continue
        found.methods[point.name] = method
        found.origins[point.name] = f"{package}, sha256 {_digest(point)}"
    return found


def _digest(point: EntryPoint) -> str:
    """Of the file that declares a method, the first 16 hexadecimal digits of its SHA-256."""
    file = sys.modules[point.module].__file__
    return hashlib.sha256(b"" if file is None else Path(file).read_bytes()).hexdigest()[:16]
