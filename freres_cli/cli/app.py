"""The ``freres`` command: its verbs, and the one place where a failure becomes a line and an exit status."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from freres_cli import __version__
from freres_cli.cli import (
    ablate,
    ask,
    batch,
    compare,
    compress,
    demo,
    doctor,
    eval,
    export,
    fidelity,
    inspect,
    methods,
    models,
    plan,
    presets,
    profile,
    repack,
    report,
    train,
    verify,
    world,
)
from freres_cli.cli.output import discard, print_error, print_result
from freres_cli.cli.values import check_values
from freres_cli.errors import ExitStatus, FreresError, ResourceError, UsageError, find_interruption, is_out_of_memory

app = typer.Typer(
    name="freres",
    help="Make video cheap for video language models: compress once into a bundle, ask it as often as you like.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

VERBS: dict[str, Callable[..., None]] = {
    "compress": compress.compress,
    "batch": batch.batch,
    "plan": plan.plan,
    "ask": ask.ask,
    "profile": profile.profile,
    "eval": eval.evaluate,
    "fidelity": fidelity.fidelity,
    "compare": compare.compare,
    "ablate": ablate.ablate,
    "train": train.train,
    "inspect": inspect.inspect,
    "report": report.report,
    "repack": repack.repack,
    "export": export.export,
    "presets": presets.presets,
    "models": models.models,
    "methods": methods.methods,
    "doctor": doctor.doctor,
    "verify": verify.verify,
    "demo": demo.demo,
}
for name, verb in VERBS.items():
    app.command(name)(check_values(verb))
app.add_typer(world.world, name="world")


def _print_version(wanted: bool) -> None:
    if wanted:
        print_result(f"freres {__version__}")
        raise typer.Exit()


@app.callback()
def freres(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make video cheap for video language models: compress once into a bundle, ask it as often as you like."""


ANY_NAME = "freres_any_name"


def _encode_any_name(error: UnicodeError) -> tuple[bytes, int]:
    """Write bytes of file names as they are, and what the terminal's encoding lacks as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return b"".join(map(_escape, error.object[error.start : error.end])), error.end


def _escape(character: str) -> bytes:
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00])
    # As JSON has it: a character beyond 16 bits is two escapes.
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)).encode()


codecs.register_error(ANY_NAME, _encode_any_name)


def main() -> None:
    """Run the command. FRERES_DEBUG=1 shows tracebacks."""
    # Exit through the `finally` blocks, so no temporary file or child process is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run()
    finally:
        # Past this point there is nothing to clean up, and an exception would only be printed.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run() -> None:
    if sys.stdout is None:
        # It was closed: results would be lost, so to write any is an error, as on what may only be read.
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ANY_NAME)  # file names may be any bytes
    try:
        app()
    except FreresError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(ExitStatus.INTERRUPTED)
    except OSError as error:
        if isinstance(status := getattr(error.__context__, "exit_code", None), int):
            sys.exit(status)  # what was to be said about a wrong flag could not be written
        if error.filename is None and _is_of_help(error):
            discard(sys.stdout)
            _fail(ResourceError(f"output cannot be written: {error.strerror}"), error)
        if error.errno in (errno.EACCES, errno.EPERM) and error.filename is not None:
            _fail(UsageError(f"{error.filename}: no permission", "name another place, or ask for rights there"), error)
        if error.errno != errno.ENAMETOOLONG:
            _fail_unexpected(error)
        _fail(UsageError(f"{str(error.filename)[:60]}...: file name too long", "name a shorter one"), error)
    except Exception as error:
        interruption = find_interruption(error)
        if isinstance(interruption, SystemExit):
            raise interruption from None
        if interruption is not None:
            sys.exit(ExitStatus.INTERRUPTED)
        if is_out_of_memory(error):
            _fail(
                ResourceError("not enough memory", "use a smaller budget or dtype, or a machine with more memory"),
                error,
            )
        _fail_unexpected(error)


def _is_of_help(error: OSError) -> bool:
    """Whether it came of printing a page of help, which is not our own."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("click", "rich", "typer")


def _fail_unexpected(error: Exception) -> NoReturn:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = "this is a bug in freres; FRERES_DEBUG=1 shows where"
    _fail(FreresError(f"unexpected: {text}", hint), error)


def _fail(failure: FreresError, cause: BaseException | None = None) -> NoReturn:
    if os.environ.get("FRERES_DEBUG") == "1":
        raise cause or failure
    print_error(failure)
    sys.exit(failure.exit_status)
