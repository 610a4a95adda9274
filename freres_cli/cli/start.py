"""Where the installed command begins. It imports nothing of ours outside the block that Ctrl-C may end."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # that of errors.ExitStatus, which is not imported yet


def main() -> None:
    """Run ``freres``. Ctrl-C while its modules are read ends it as quietly as later on."""
    try:
        from freres_cli.cli.app import main as run
        from freres_cli.imports import declare_command
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    declare_command()
    run()
