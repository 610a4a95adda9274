"""The paper's ablations on any questions: which part of Fre-Res does what, at equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from freres_cli.errors import UsageError
from freres_cli.presets import Setting
from freres_cli.workflows.adapters import load_adapter
from freres_cli.workflows.budgets import Budget, Cell
from freres_cli.workflows.compress import CompressRequest
from freres_cli.workflows.questions import QuestionFile
from freres_cli.workflows.train_adapter import Recipe, TrainRequest, load_model, train_adapter

# What each trained row is trained for: the same data, steps and seed.
TRAINED_VARIANTS = ("absorber", "concat", "idct")
TRAINED = "trained"


@dataclass(frozen=True)
class Row:
    """A line of a table: its settings beside the preset's, and the variant whose adapter it has, if any."""

    label: str
    settings: tuple[tuple[str, Any], ...]
    adapter: str | None = None


def _sweep(label: str, key: str, values: Sequence[Any]) -> tuple[Row, ...]:
    return tuple(Row(f"{label} {value}", ((key, value),), "absorber") for value in values)


# Paper: components Tables 4 and 6; coefficients, frames and anchors Table 5. Ours: its grouping scale N is reading one
# frame in N, since a trajectory of ours is one of frames; rates are those of the world's 8 frames a second.
TABLES: dict[str, tuple[Row, ...]] = {
    "components": (
        Row("anchors only", (("variant", "anchors"),)),
        Row("temporal only", (("variant", "temporal"),)),
        Row("concatenation, untrained", (("variant", "concat"),)),
        Row("concatenation, trained", (("variant", "concat"),), "concat"),
        Row("inverse DCT, untrained", (("variant", "idct"),)),
        Row("inverse DCT, trained", (("variant", "idct"),), "idct"),
        Row("absorber, untrained", (("variant", "absorber"),)),
        Row("absorber, trained", (("variant", "absorber"),), "absorber"),
    ),
    "coefficients": _sweep("coefficients", "max_coefficients", (1, 2, 3, 5)),
    "frames": (
        Row("one frame in 2", (("sample", "fps"), ("sample_fps", 4.0)), "absorber"),
        Row("one frame in 4", (("sample", "fps"), ("sample_fps", 2.0)), "absorber"),
    ),
    "anchors": _sweep("anchors", "anchors", (6, 8, 10)),
}


def parse_tables(text: str) -> tuple[str, ...]:
    """Names of tables, separated by commas. Raises ``UsageError``."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in TABLES or names.count(name) > 1:
            raise UsageError(f"--tables: expected some of {', '.join(TABLES)}, each once, got {text!r}")
    return names


def make_cells(tables: Sequence[str], budgets: Sequence[Budget], adapters: Mapping[str, Path]) -> tuple[Cell, ...]:
    """The full-token row, then every row of the tables at every budget. Without ``adapters`` no row is trained: those
    of the components that would be are left out, the sweeps are of untrained tokens."""
    cells = [Cell("full", None)]
    for name in tables:
        for row in TABLES[name]:
            if row.adapter and not adapters and name == "components":
                continue
            path = adapters.get(row.adapter or "")
            cells += [Cell("fre-res", budget, row.label, row.settings, path) for budget in budgets]
    return tuple(cells)


def train_variants(
    data: QuestionFile, compress: CompressRequest, recipe: Recipe, folder: Path, log: Callable[[str], None]
) -> dict[str, Path]:
    """Train an adapter for each variant, or find it in ``folder`` from an earlier run. Raises ``UsageError`` for one
    that other data or another recipe made."""
    adapters = {}
    for variant in TRAINED_VARIANTS:
        path = folder / f"{variant}.safetensors"
        settings = {**compress.settings, "variant": Setting(variant, "ablate")}
        request = TrainRequest(data, replace(compress, settings=settings), recipe, path, folder / "cache")
        if path.exists():
            _check_same_training(request)
        else:
            train_adapter(request, lambda line, variant=variant: log(f"{variant}: {line}"))  # type: ignore[misc]
        adapters[variant] = path
    return adapters


def _check_same_training(request: TrainRequest) -> None:
    made = load_adapter(request.output, load_model(request.compress).fingerprint).training
    wanted = {"recipe": request.recipe.facts(), "data_sha256": request.data.sha256}
    if any(made.get(key) != value for key, value in wanted.items()):
        raise UsageError(f"{request.output}: trained by other data or another recipe", "remove it, or use another -o")
