"""The files that ``freres eval`` writes beside its tables: rows as CSV, and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freres_cli.evaluation.accuracy_csv import write_rows
from freres_cli.evaluation.accuracy_plot import draw_accuracy
from freres_cli.evaluation.plots import PLOT_FLAG, PlotFile
from freres_cli.files import InputFiles, check_destination, write_atomically

CSV_FLAG = "--csv"


@dataclass(frozen=True)
class EvalFiles:
    """Where to write the rows as CSV, ``table``, and accuracy against tokens as a PNG, ``plot``. ``None``: nowhere."""

    table: Path | None = None
    plot: Path | None = None

    def check(self, force: bool, taken: InputFiles) -> None:
        """Refuse, before any work is done, files that cannot be written. ``force``: existing ones may be replaced.
        ``taken``: files that the run reads or writes otherwise; it gets these as well. Raises ``UsageError``."""
        for flag, path in ((CSV_FLAG, self.table), (PLOT_FLAG, self.plot)):
            taken.refuse(path, flag)
            taken.add(f"file of {flag}", path)
        if self.table is not None:
            check_destination(self.table, force, CSV_FLAG)
        if self.plot is not None:
            PlotFile(self.plot, force).check()

    def write(self, summary: dict[str, Any], force: bool) -> None:
        """Write the files. ``summary``: of ``scores.summarize``. ``force``: replace existing ones. Raises ``UsageError``
        or ``ResourceError``."""
        if self.table is not None:
            text = write_rows(summary["rows"])
            write_atomically(self.table, lambda file: file.write(text.encode()), force=force, flag=CSV_FLAG)
        if self.plot is not None:
            PlotFile(self.plot, force).write(draw_accuracy(summary))


NO_FILES = EvalFiles()
