"""What every plot shares: matplotlib, which is an extra, and the picture as bytes."""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from freres_cli.errors import UsageError
from freres_cli.files import check_destination

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_FLAG = "--plot"


def check_plot(path: Path, force: bool) -> None:
    """Refuse, before any work is done, a plot that cannot be drawn or written. ``force``: replace an existing file.
    Raises ``UsageError``."""
    if find_spec("matplotlib") is None:
        raise UsageError(f"{PLOT_FLAG}: needs matplotlib, which is not installed", "run: pip install 'freres[plot]'")
    if path.suffix.lower() != ".png":
        raise UsageError(f"{PLOT_FLAG}: expected a file name ending in .png, got {path}")
    check_destination(path, force, PLOT_FLAG)


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
