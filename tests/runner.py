"""Run the command in this process, as a user's shell would see it, and check how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from freres_cli.errors import FreresError


@dataclass(frozen=True)
class Run:
    """Exit status and both streams of one run."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def run_freres(*arguments: object, stdin: str | bytes = "") -> Run:
    """Run ``freres`` with these arguments in this process. ``stdin``: what it reads; bytes are decoded as from a pipe."""
    from freres_cli.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    argv, previous_stdin = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["freres", *map(str, arguments)], _open_stdin(stdin)
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv, sys.stdin = argv, previous_stdin
    return Run(status, out.getvalue(), err.getvalue())


def _open_stdin(content: str | bytes) -> io.TextIOBase:
    if isinstance(content, str):
        return io.StringIO(content)
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def check_failure(run: Run, status: int, text: str = "") -> None:
    """One error line, the right status, nothing on stdout, no traceback."""
    assert run.status == status, (run.status, run.err)
    assert len(run.errors) == 1 and text in run.errors[0], run.err
    assert run.out == "" and "Traceback" not in run.err


@contextlib.contextmanager
def fails(status: int, text: str = "") -> Iterator[pytest.ExceptionInfo[FreresError]]:
    """Expect what runs inside to raise the error that the command would end with: its status, and its message."""
    with pytest.raises(FreresError) as caught:
        yield caught
    assert caught.value.exit_status == status and text in caught.value.message, repr(caught.value)
