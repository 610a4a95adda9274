"""Render the chat template of a checkpoint, which is a program that somebody else wrote, within limits."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from freres_cli.errors import BackboneError
from freres_cli.imports import is_command

LIMIT_S = 5.0  # a template takes milliseconds
GRACE_S = 1.0
MAX_CHARACTERS = 2**20
MOST_BYTES = 2**30  # more than before, while a template runs; it takes kilobytes
# Reasoning would fill the tokens that an answer may have. Templates that know no reasoning ignore the wish.
OPTIONS = {"add_generation_prompt": True, "enable_thinking": False}
HINT = "its chat template is at fault: use another copy of the model"

_ONE_AT_A_TIME = threading.Lock()
_RENDERED: set[str] = set()  # templates that have stayed within the limit of memory


class _OutOfTimeError(BaseException):
    """Raised in the thread that renders. No template can catch it."""


def render_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str | None:
    """Return the prompt that the tokenizer's chat template makes of ``messages``; ``None`` if it has none, or one that
    cannot handle a message in parts. The template is asked to leave out reasoning.

    Templates run in a sandbox of transformers, which bounds a loop but not loops within loops. So the template runs in a
    thread that is stopped after ``LIMIT_S`` (ours). A single operation cannot be stopped, so memory has a limit too. It is
    the whole process's: where others' code runs as well, there is one only until the template has kept to it. Raises
    BackboneError for a template that takes longer or more, writes more than ``MAX_CHARACTERS``, or fails in any way but
    those that templates have to say no.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    made: list[str] = []
    failures: list[BaseException] = []

    def render() -> None:
        try:
            made.append(tokenizer.apply_chat_template(messages, tokenize=False, **OPTIONS))
        except BaseException as error:  # handed to the caller's thread
            failures.append(error)

    thread = threading.Thread(target=render, daemon=True)
    template = repr(tokenizer.chat_template)
    with nullcontext() if template in _RENDERED and not is_command() else _bounded_memory():
        thread.start()
        thread.join(LIMIT_S)
        if is_late := thread.is_alive():
            late = ctypes.py_object(_OutOfTimeError)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), late)
            thread.join(GRACE_S)
    if is_late:
        raise BackboneError(f"chat template: not done after {LIMIT_S:g} s", HINT)
    if failures:
        _judge(failures[0])
        return None
    if len(made[0]) > MAX_CHARACTERS:
        raise BackboneError(f"chat template: expected at most {MAX_CHARACTERS} characters, got {len(made[0])}", HINT)
    _RENDERED.add(template)
    return made[0]


def tokenize_chat(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a prompt. As in transformers' processors, the tokenizer puts before it what it puts before any text,
    if it does not begin with that already."""
    bos = tokenizer.bos_token
    has_begun = bos is not None and text.startswith(bos)
    return list(tokenizer(text, add_special_tokens=not has_begun)["input_ids"])


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process take at most ``MOST_BYTES`` more than it has. Without /proc there is no limit."""
    with _ONE_AT_A_TIME:  # the limit is the process's: a second thread would take this one's for what was before
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
        except OSError:
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + MOST_BYTES
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _judge(failure: BaseException) -> None:
    """Pass over a refusal, and raise anything else."""
    if isinstance(failure, TypeError | TemplateError):
        return  # a template for text alone
    if isinstance(failure, MemoryError):
        raise BackboneError(f"chat template: takes more than {MOST_BYTES >> 30} GiB of memory", HINT) from failure
    if isinstance(failure, ArithmeticError | LookupError | ValueError | AttributeError | RecursionError):
        reason = " ".join(str(failure).split())[:200]
        raise BackboneError(f"chat template: {type(failure).__name__}: {reason}", HINT) from failure
    raise failure
