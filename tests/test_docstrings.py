"""Docstrings: everything public has one, and a function with more than three arguments lists each of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "freres_cli").rglob("*.py"))
MOST_UNLISTED = 3
# What a method of a protocol says, its implementations need not say again.
SAME_AS_ANOTHER = ("See ``", "as there", "Arguments as")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function, str]]:
    """Name, definition and docstring of each public function; of ``__init__`` the class's docstring counts too."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            for inner in node.body:
                if isinstance(inner, Function) and (inner.name == "__init__" or not inner.name.startswith("_")):
                    own = ast.get_docstring(inner) or ""
                    yield f"{node.name}.{inner.name}", inner, own + text if inner.name == "__init__" else own


def arguments_of(function: Function) -> list[str]:
    """Names of the arguments but ``self`` and ``cls``; a verb's flags have their own help, and do not count."""
    listed = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    is_verb = any("typer." in ast.unparse(a.annotation) for a in listed if a.annotation is not None)
    return [] if is_verb else [a.arg for a in listed if a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def problems_of(source: str) -> list[str]:
    found = []
    for name, function, text in public_functions(ast.parse(source)):
        arguments = arguments_of(function)
        if not text and not name.endswith(("__init__", ".forward", ".to_dict")) and not is_overload(function):
            found.append(f"{name}:{function.lineno}: no docstring")
        if len(arguments) > MOST_UNLISTED and not any(words in text for words in SAME_AS_ANOTHER):
            missing = [argument for argument in arguments if f"``{argument}``" not in text]
            if missing:
                found.append(f"{name}:{function.lineno}: does not list {', '.join(missing)}")
    return found


def is_overload(function: Function) -> bool:
    """A property or override of few words, whose class says what it is."""
    return bool(function.decorator_list) or len(arguments_of(function)) == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "freres_cli")))
def test_public_functions_list_their_arguments(path: Path) -> None:
    assert problems_of(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('def f(a, b, c, d):\n    """``a``, ``b``, ``c``."""', 1),
        ('def f(a, b, c, d):\n    """``a``, ``b``, ``c``, ``d``."""', 0),
        ('def f(a, b, c):\n    """Short."""', 0),
        ("def f(a):\n    pass", 1),
        ('class A:\n    """``a b c d``"""\n    def __init__(self, a, b, c, d):\n        pass', 1),
        ("def _f(a, b, c, d):\n    pass", 0),
    ],
)
def test_the_check_sees(source: str, count: int) -> None:
    assert len(problems_of(source)) == count
