"""Imports that are put off are still there when they are used."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment as theirs

from freres_cli.imports import linear_sum_assignment as ours
from freres_cli.imports import quick_imports


def test_the_function_that_is_put_off_is_scipys() -> None:
    costs = np.random.default_rng(0).random((6, 8))
    for maximize in (False, True):
        got, expected = ours(costs, maximize=maximize), theirs(costs, maximize=maximize)
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
