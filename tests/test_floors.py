"""The house's floors: imports go down only, siblings never import each other, files and functions stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "freres_cli"
# Units from the top floor to the ground. The package's own __init__ has two sides: the version lies below them all, and
# the Python API that it opens stands on the pipeline.
API = "the API"
FLOORS = (
    ("cli", "integrations"),
    ("workflows", API),
    ("pipeline",),
    ("world",),
    ("video", "backbones", "method", "baselines", "bundle", "evaluation", "training", "bench", "page"),
    ("content",),
    ("stretches",),
    ("tracks",),
    ("records", "presets", "devices", "files", "imports"),
    ("errors",),
    ("",),
)
FLOOR_OF = {unit: len(FLOORS) - floor for floor, units in enumerate(FLOORS) for unit in units}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "legacy", "misc"}


@dataclass(frozen=True)
class Import:
    """A module of ours that a file imports, wherever the statement stands."""

    line: int
    module: str


def unit_of(module: str) -> str:
    """``freres_cli.video.decode`` -> ``video``; the package itself -> the empty name."""
    return [*module.split("."), ""][1]


def own_unit(module: str) -> str:
    """The unit that a file's imports are judged by."""
    return unit_of(module) or API


def find_imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Imports of our package, in functions and under TYPE_CHECKING too, and modules named in texts (lazy loading)."""
    tree = ast.parse(source)
    parent = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from freres_cli import errors` names a module, `from freres_cli.errors import X` does not.
            names = [f"{start}.{alias.name}" for alias in node.names] if start == PACKAGE else [start]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(rf"^{PACKAGE}(?:\.\w+)+(?=:|$)", node.value)
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE:
                yield Import(node.lineno, name)


def broken_floors(source: str, module: str, is_package: bool = False) -> list[str]:
    """``module:line: imports X`` for each import that goes up or sideways."""
    own = own_unit(module)
    found = []
    for item in find_imports(source, module, is_package):
        target = unit_of(item.module)
        target = target if target in FLOOR_OF else "" if target.startswith("__") else target
        if target not in FLOOR_OF:
            found.append(f"{module}:{item.line}: imports {item.module}, which has no floor")
        elif target != own and FLOOR_OF[target] >= FLOOR_OF[own]:
            way = "sideways" if FLOOR_OF[target] == FLOOR_OF[own] else "up"
            found.append(f"{module}:{item.line}: imports {item.module}, {way}")
    return found


def long_functions(source: str) -> list[tuple[str, int, int]]:
    """Name, line and length of each function whose body is too long: flags of a verb and docstrings do not count."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [
        (f.name, f.lineno, (f.end_lineno or 0) + 1 - next((n for n in f.body if not is_docstring(n)), f).lineno)
        for f in functions
    ]
    return [item for item in lengths if item[2] >= MAX_FUNCTION_LINES]


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_test_files_are_short() -> None:
    long = {p.name for p in (ROOT / "tests").rglob("*.py") if len(p.read_text().splitlines()) > MAX_FILE_LINES}
    assert long == set()


@pytest.fixture(params=files(), ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_imports_go_down_only(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert broken_floors(source, module_name(path), path.name == "__init__.py") == []


def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES


def test_functions_are_short(path: Path) -> None:
    assert long_functions(path.read_text(encoding="utf-8")) == []


def test_file_has_a_name_that_says_something(path: Path) -> None:
    names = {part.removesuffix(".py").strip("_") for part in path.relative_to(ROOT).parts}
    assert not names & FORBIDDEN_NAMES


def test_every_unit_has_a_floor() -> None:
    assert {unit_of(module_name(path)) for path in files()} <= set(FLOOR_OF)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import freres_cli.cli.app", "freres_cli.workflows.ask"),
        ("from freres_cli.bundle.store import read_bundle", "freres_cli.video.decode"),
        ("from freres_cli import presets", "freres_cli.records"),
        ("def f():\n    from freres_cli.workflows import ask", "freres_cli.method.dct"),
        ("if TYPE_CHECKING:\n    from freres_cli.records import Tracks", "freres_cli.errors"),
        ("from ..bundle import store", "freres_cli.video.decode"),
        ("from .. import bundle", "freres_cli.video.decode"),
        ("LAZY = 'freres_cli.backbones.qwen2_vl:Encoder'", "freres_cli.method.dct"),
        ("from freres_cli.colours import red", "freres_cli.cli.app"),
        ("from freres_cli.pipeline import session", "freres_cli.world.make"),
        ("from freres_cli.world import make", "freres_cli.backbones.base"),
        ("from freres_cli.tracks import Tracks", "freres_cli.files"),
        ("from freres_cli.workflows.ask import x", "freres_cli.pipeline.session"),
        ("HOME = 'freres_cli.workflows.ask'", "freres_cli"),
    ],
)
def test_the_check_sees(source: str, module: str) -> None:
    assert len(broken_floors(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from freres_cli.workflows.compress import x\nfrom freres_cli import __version__", "freres_cli.workflows.ask"),
        ("from freres_cli.errors import FreresError", "freres_cli.cli.app"),
        ("HOME = 'freres_cli.pipeline.session'", "freres_cli"),
        ("from freres_cli.backbones import base", "freres_cli.world.train_tower"),
        ("from . import store", "freres_cli.bundle.schema"),
        ("import torch\nimport freres_cli_other", "freres_cli.method.dct"),
        ("'see freres_cli.cli for more'", "freres_cli.method.dct"),
    ],
)
def test_the_check_lets_pass(source: str, module: str) -> None:
    assert broken_floors(source, module) == []


def test_the_check_counts_lines() -> None:
    body = "    x = 1\n"
    assert long_functions("def f():\n" + body * (MAX_FUNCTION_LINES - 1)) == []
    assert long_functions("class A:\n  @d\n  def f(self):\n" + body * MAX_FUNCTION_LINES) == [("f", 3, 50)]
