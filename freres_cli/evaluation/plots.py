"""What every ``--plot`` shares. The only module that imports matplotlib, which is an extra."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from freres_cli.errors import UsageError
from freres_cli.files import check_destination, write_atomically

PLOT_FLAG = "--plot"
MAX_TITLE = 60
NUM_COLOURS = 10  # "C0" to "C9"; then they repeat
MOST_PER_COLUMN = 20  # entries of a legend
# Told apart with any colour vision, and in print by their lightness; markers and hatches tell them apart as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo")


@dataclass(frozen=True)
class PlotFile:
    """The PNG file to draw into. ``force``: replace an existing one."""

    path: Path
    force: bool = False

    def check(self) -> None:
        """Refuse, before any work is done, a plot that cannot be drawn or written. Raises ``UsageError``."""
        find_matplotlib(PLOT_FLAG)
        if self.path.suffix.lower() != ".png":
            raise UsageError(f"{PLOT_FLAG}: expected a file name ending in .png, got {self.path}")
        check_destination(self.path, self.force, PLOT_FLAG)

    def write(self, png: bytes) -> None:
        """Write the picture. Raises ``UsageError`` or ``ResourceError``."""
        write_atomically(self.path, lambda file: file.write(png), force=self.force, flag=PLOT_FLAG)


def find_matplotlib(flag: str) -> None:
    """Check that matplotlib is installed. ``flag``: what needs it. Raises ``UsageError``."""
    if find_spec("matplotlib") is None:
        raise UsageError(f"{flag}: needs matplotlib, which is not installed", "run: pip install 'freres[plot]'")


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_legend(figure: Any, num_names: int) -> None:
    """Draw the legend of all axes beside them, in as many columns as ``num_names`` need. Names are no formulas."""
    columns = -(-num_names // MOST_PER_COLUMN)
    for text in figure.legend(loc="outside right upper", fontsize="small", ncols=columns).get_texts():
        text.set_parse_math(False)


def encode_figure(figure: Any) -> bytes:
    """Return a figure as a PNG file."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def short_name(name: str) -> str:
    """Return a file's name as it can be drawn: its end if it is long, ``?`` for what cannot be printed.

    Draw it with ``set_parse_math(False)``: names may hold dollar signs, which would start a formula.
    """
    text = "".join(c if c.isprintable() else "?" for c in name.encode("utf-8", "replace").decode())
    return text if len(text) <= MAX_TITLE else f"...{text[-MAX_TITLE:]}"
