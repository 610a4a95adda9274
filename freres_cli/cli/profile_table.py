"""``freres profile --table``: the paper's cost table, printed beside the paper's own figures and a floor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freres_cli.cli.output import format_seconds, print_json, print_line, print_result, print_table
from freres_cli.errors import ResourceError, UsageError, count_of
from freres_cli.presets import BUNDLED

if TYPE_CHECKING:
    from freres_cli.bench.tables import CostTable
    from freres_cli.workflows.profile_table import TableRequest

WEIGHTS = ("stored", "random")


def find_table(name: str) -> CostTable:
    """Return the table with this name. Raises ``UsageError``."""
    from freres_cli.bench.tables import TABLES

    if name not in TABLES:
        raise UsageError(f"--table: expected one of {', '.join(TABLES)}, got {name}")
    return TABLES[name]


@contextmanager
def weights_of(model: str | None, weights: str) -> Iterator[tuple[str | None, tuple[str, ...]]]:
    """What to load for ``--model`` and ``--weights``, and notes about it.

    With ``random`` weights that is a folder with a config and a tokenizer: the one that ``model`` names, or one that is
    made here for a released checkpoint, and removed afterwards. Raises ``UsageError`` or ``BackboneError``.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"--weights: expected one of {', '.join(WEIGHTS)}, got {weights}")
    if weights == "stored":
        yield model, ()
        return
    if model in (None, BUNDLED):
        raise UsageError("--weights random: expected --model as well", "name a folder, or a checkpoint as Qwen3-VL-8B")
    from freres_cli.backbones.drawn import DRAWN_NOTE
    from freres_cli.backbones.released import TOKENIZER_NOTE, write_weightless

    assert model is not None
    if Path(model).expanduser().is_dir():
        yield model, (DRAWN_NOTE,)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(write_weightless(model, Path(folder))), (DRAWN_NOTE, TOKENIZER_NOTE)


HINTS = {
    "timed_out": "raise --timeout",
    "out_of_memory": "use a machine with more memory, or fewer tokens",
    "context_exceeded": "name a model with a longer context, or use fewer tokens",
}


def require_figures(rows: Sequence[dict[str, Any]]) -> None:
    """Raise ``ResourceError`` if none of these rows has its figures: nothing was measured."""
    if not any(row["status"] == "ok" for row in rows):
        first = rows[0]
        name = first.get("name", first["method"])
        raise ResourceError(f"row {name}: {first['status']}: {first['message']}", HINTS[first["status"]])


def print_cost_table(request: TableRequest, facts: dict[str, Any], *, json: bool) -> None:
    """Measure a table and print it. ``facts``: what the JSON document also has. ``json``: print that document. Raises
    ``ResourceError`` if no row has its figures."""
    from freres_cli.bench.report import describe_environment
    from freres_cli.workflows.profile_table import profile_table

    rows = profile_table(request)
    if json:
        asked = {"question": request.question, "repeat": request.repeat, "warmup": request.warmup}
        document = {"target": f"table {request.table.name}", **asked, **facts, "plot": None, "rows": rows}
        print_json("freres.profile/1", {**document, "environment": describe_environment(request.device)})
    else:
        _print_rows(rows, request)
    require_figures(rows)


def _print_rows(rows: list[dict[str, Any]], request: TableRequest) -> None:
    from freres_cli.bench.tables import PAPER_SOURCE

    columns = ("row", "context", "text", "prefill", "TTFT", "floor", "paper", "peak memory", "floor", "paper")
    print_table(columns, [_cells(row) for row in rows])
    for row in rows:
        if row["message"]:
            print_line(f"{row['name']}: {row['message']}")
    print_line(f"paper: {PAPER_SOURCE}; its prompts have 22 tokens of text")
    print_line("GB: ours are 10^9 bytes; the paper does not say what its are")
    print_line("floor: derived from the FLOPs of the prompt and the fastest matrix product here; weights and KV cache")
    print_result(f"medians of {count_of(request.repeat, 'run')}; --json has the spread")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    paper, floor = row["paper"], row["floor"]
    name = row["name"] if row["status"] == "ok" else f"{row['name']} ({row['status']})"
    theirs = ("-", "-")
    if paper is not None:
        is_known = paper["status"] == "ok"
        theirs = (
            (format_seconds(paper["ttft_s"]), f"{paper['peak_memory_gb']:.2f} GB")
            if is_known
            else (paper["status"],) * 2
        )
    return (
        name,
        str(row["context_tokens"]),
        "-" if row["text_tokens"] is None else str(row["text_tokens"]),
        format_seconds(row["prefill_s"]),
        format_seconds(row["ttft_s"]),
        format_seconds(floor["ttft_s"]),
        theirs[0],
        _format_gb(row["peak_memory_bytes"]),
        _format_gb(floor["memory_bytes"]),
        theirs[1],
    )


def _format_gb(num_bytes: float | None) -> str:
    """Bytes in the paper's unit, so that columns side by side can be compared."""
    return "-" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"
