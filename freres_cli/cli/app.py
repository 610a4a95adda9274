"""The ``freres`` command: its verbs, and the one place where a failure becomes a line and an exit status."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from freres_cli import __version__
from freres_cli.cli import ask, compress, demo, doctor, inspect, models, presets, profile, repack
from freres_cli.cli.output import print_error, print_result
from freres_cli.errors import ExitStatus, FreresError, ResourceError

app = typer.Typer(
    name="freres",
    help="Make video cheap for video language models: compress once into a bundle, ask it as often as you like.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("compress")(compress.compress)
app.command("ask")(ask.ask)
app.command("profile")(profile.profile)
app.command("inspect")(inspect.inspect)
app.command("repack")(repack.repack)
app.command("presets")(presets.presets)
app.command("models")(models.models)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


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


def main() -> None:
    """Run the command. FRERES_DEBUG=1 shows tracebacks."""
    try:
        app()
    except FreresError as error:
        _fail(error)
    except MemoryError as error:
        _fail(ResourceError("not enough memory", "lower --budget, or use a smaller --dtype"), error)
    except BrokenPipeError:
        # The reader went away, as `head` does; nothing is left to say, not even at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitStatus.DONE)
    except KeyboardInterrupt:
        sys.exit(ExitStatus.INTERRUPTED)
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "this is a bug in freres; FRERES_DEBUG=1 shows where"
        _fail(FreresError(f"unexpected: {text}", hint), error)


def _fail(failure: FreresError, cause: BaseException | None = None) -> None:
    if os.environ.get("FRERES_DEBUG") == "1":
        raise cause or failure
    print_error(failure)
    sys.exit(failure.exit_status)
