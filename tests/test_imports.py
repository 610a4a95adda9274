"""Imports that are put off are still there when they are used."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment as theirs

from freres_cli import imports
from freres_cli.backbones.registry import import_half
from freres_cli.imports import SCIPY, call_later, quick_imports
from tests.clips import write_clip


def test_the_function_that_is_put_off_is_scipys() -> None:
    costs = np.random.default_rng(0).random((6, 8))
    for maximize in (False, True):
        got, expected = call_later(SCIPY, costs, maximize=maximize), theirs(costs, maximize=maximize)
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


LAWS = """
import sys
from freres_cli.imports import quick_imports
with quick_imports():
    {statement}
    assert ("scipy" in sys.modules) is {is_imported}
import scipy.optimize
assert type(scipy.optimize).__name__ == "module" and scipy.optimize is sys.modules["scipy.optimize"]
assert scipy.optimize.linear_sum_assignment([[2.0, 1.0], [1.0, 2.0]])[1].tolist() == [1, 0]
"""


@pytest.mark.parametrize(
    ("statement", "is_imported"),
    [
        ("from scipy.optimize import linear_sum_assignment", False),
        ("from scipy.optimize import minimize; assert minimize.__module__.startswith('scipy')", True),
        (
            "import scipy.optimize._root as r; assert r is sys.modules['scipy.optimize']._root and r.__spec__.origin",
            True,
        ),
    ],
)
def test_scipy_is_whole_again_after_the_block(statement: str, is_imported: bool) -> None:
    program = LAWS.format(statement=statement, is_imported=is_imported)
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("is_collecting", [True, False])
def test_garbage_collection_is_as_it_was_even_after_an_error(is_collecting: bool) -> None:
    try:
        gc.enable() if is_collecting else gc.disable()
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == is_collecting
    finally:
        gc.enable()


def test_only_a_command_keeps_what_is_there_out_of_garbage_collection(monkeypatch) -> None:
    """In a program of a user, what is there may be garbage already, and a frozen cycle is never freed."""
    for is_command in (False, True):
        monkeypatch.setattr(imports, "_is_command", is_command)
        before = gc.get_freeze_count()
        try:
            with quick_imports():
                pass
            import_half("qwen2_vl", "language")
            assert (gc.get_freeze_count() > before) == is_command
        finally:
            gc.unfreeze()


COMMAND = """
import sys
from freres_cli import imports
imports.declare_command()
with imports.quick_imports():
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
    from transformers.masking_utils import TransformGetItemToIndex
    from transformers.models.qwen2_vl import modeling_qwen2_vl
    {statement}
print([name in sys.modules for name in ("torch._dynamo", "torch.distributed.tensor", "sympy")])
import torch, torch._dynamo
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as theirs
assert type(torch._dynamo) is type(sys) and torch.distributed.is_available()
assert not has_free_unbacked_symbols(torch.tensor(1)) and sys.modules[imports.SHAPES].free_symbols
assert torch.compiler.disable.__module__ == "torch.compiler"
with TransformGetItemToIndex() as mode:
    assert type(mode) is theirs
assert int(torch.compile(lambda x: x + 1, backend="eager")(torch.tensor(1))) == 2
"""


# After the block: a whole command, which is not to import them either.
RUN = """pass
from freres_cli.cli import start
try:
    start.main()
except SystemExit as end:
    assert not end.code"""
USE = "from torch._dynamo import config; assert config.__name__ == 'torch._dynamo.config'"
USE_PART = "import torch._dynamo.utils as u; assert u is sys.modules['torch._dynamo'].utils and u.__spec__.origin"


def test_what_is_used_of_one_leaves_the_others_put_off() -> None:
    program = """
import sys
from freres_cli import imports
imports.declare_command()
with imports.quick_imports():
    from torch.fx.experimental.symbolic_shapes import free_symbols
    assert "sympy" in sys.modules
    for name in (imports.SCIPY, imports.COMPILER):
        assert isinstance(sys.modules[name], imports._StandIn)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("statement", "environment", "is_imported"),
    [
        (RUN, {}, False),
        pytest.param(USE, {}, True, marks=pytest.mark.slow),
        (USE_PART, {}, True),
        pytest.param("pass", {"WORLD_SIZE": "2"}, True, marks=pytest.mark.slow),
    ],
)
def test_a_command_imports_no_compiler_until_it_is_used(statement, environment, is_imported, tmp_path) -> None:
    clip, bundle = write_clip(tmp_path / "clip.mp4", 4), tmp_path / "b.pt"
    command = [sys.executable, "-c", COMMAND.format(statement=statement), "compress", clip, "-o", bundle]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    assert run.stdout == f"{bundle}\n" * (statement == RUN) + f"{[is_imported] * 3}\n"


FOLDERS = """
import functools
from functools import lru_cache
from freres_cli.imports import quick_imports
with quick_imports():
    import transformers.models
    @functools.lru_cache
    def plain(): pass
    @functools.lru_cache(maxsize=3, typed=True)
    def few(): pass
assert functools.lru_cache is lru_cache
assert plain.cache_parameters() == {"maxsize": 128, "typed": False}
assert few.cache_parameters() == {"maxsize": 3, "typed": True}
from transformers.utils.import_utils import create_import_structure_from_path
known = create_import_structure_from_path.cache_info()
assert known.misses == known.currsize > 128, known
assert known.hits > 128, known
"""


def test_each_folder_of_transformers_is_read_once() -> None:
    run = subprocess.run([sys.executable, "-c", FOLDERS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
