"""The paper's ablations on any set of questions: what each part of Fre-Res contributes, at equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from freres_cli.baselines.registry import FRE_RES
from freres_cli.errors import BackboneError, UsageError
from freres_cli.evaluation.cells import Budget, Cell
from freres_cli.evaluation.questions import QuestionFile
from freres_cli.method.absorber import AMPLITUDE
from freres_cli.pipeline.adapters import load_adapter
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.presets import Settings
from freres_cli.workflows.train_adapter import TrainRequest, describe_left_out, train_adapter
from freres_cli.workflows.training_data import used_settings
from freres_cli.workflows.training_loop import Recipe


@dataclass(frozen=True)
class Row:
    """A row of a table: the settings it changes (key, value), and the variant whose adapter it uses, if any."""

    label: str
    settings: tuple[tuple[str, Any], ...]
    adapter: str | None = None


ABSORBER = ("variant", "absorber")  # used by the sweeps, whatever the preset says


def _sweep(label: str, key: str, values: Sequence[Any]) -> tuple[Row, ...]:
    return tuple(Row(f"{label} {value}", ((key, value), ABSORBER), "absorber") for value in values)


def _at_rate(fps: float) -> tuple[tuple[str, Any], ...]:
    """So many frames a second, whatever a preset adds between those that it samples."""
    return ("sample", "fps"), ("sample_fps", fps), ("track_density", 1)


# Paper: Tables 4 and 6 for components; Table 5 for coefficients, frames and anchors. Ours: the paper's grouping scale N
# becomes reading fewer frames a second, because our trajectories run over frames: of the drawn world's level 1, with 8, one
# in 2 and one in 4. Ours too: our absorber's queries already hold the kept coefficients, so its two parts have rows of
# their own: attention from the paper's queries, and the sparse inverse DCT without attention.
TABLES: dict[str, tuple[Row, ...]] = {
    "components": (
        Row("anchors only", (("variant", "anchors"),)),
        Row("temporal only", (("variant", "temporal"),)),
        Row("concatenation, untrained", (("variant", "concat"),)),
        Row("concatenation, trained", (("variant", "concat"),), "concat"),
        Row("inverse DCT, untrained", (("variant", "idct"),)),
        Row("inverse DCT, trained", (("variant", "idct"),), "idct"),
        Row("I-token queries, untrained", (("variant", "iquery"),)),
        Row("I-token queries, trained", (("variant", "iquery"),), "iquery"),
        # Untrained, the absorber adds nothing: it is the sparse inverse DCT.
        Row("sparse inverse DCT, trained", (("variant", "sparse-idct"),), "sparse-idct"),
        Row("absorber, untrained", (("variant", "absorber"),)),
        Row("absorber, trained", (("variant", "absorber"),), "absorber"),
    ),
    "coefficients": _sweep("coefficients", "max_coefficients", (1, 2, 3, 5)),
    "frames": (
        Row("4 frames a second", (*_at_rate(4.0), ABSORBER), "absorber"),
        Row("2 frames a second", (*_at_rate(2.0), ABSORBER), "absorber"),
    ),
    "anchors": _sweep("anchors", "anchors", (6, 8, 10)),
}


def parse_tables(text: str) -> tuple[str, ...]:
    """Return the table names in a comma-separated list. Raises ``UsageError``."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in TABLES or names.count(name) > 1:
            raise UsageError(f"--tables: expected names from {', '.join(TABLES)}, each at most once, got {text!r}")
    return names


def trained_variants(tables: Sequence[str]) -> tuple[str, ...]:
    """Return the variants that the rows of these tables need an adapter for: all on the same data, with the same steps and
    seed."""
    return tuple(sorted({row.adapter for name in tables for row in TABLES[name] if row.adapter}))


def make_cells(tables: Sequence[str], budgets: Sequence[Budget], adapters: Mapping[str, Path]) -> tuple[Cell, ...]:
    """Return the full-token cell, then every row of the tables at every budget.

    ``adapters``: paths by variant. If there are none, the trained rows of the components table are left out, and the
    sweeps use untrained tokens.
    """
    cells = [Cell("full", None)]
    for name in tables:
        for row in TABLES[name]:
            if row.adapter and not adapters and name == "components":
                continue
            path = adapters.get(row.adapter or "")
            cells += [Cell(FRE_RES, budget, row.label, row.settings, path) for budget in budgets]
    return tuple(cells)


def train_variants(
    data: QuestionFile,
    options: CompressOptions,
    recipe: Recipe,
    tables: Sequence[str],
    folder: Path,
    log: Callable[[str], None],
    warn: Callable[[str], None],
    models: Models | None = None,
) -> dict[str, Path]:
    """Return the path of an adapter for each variant of the tables, trained now or found in ``folder`` from an earlier run.

    ``data``: the questions to train on. ``options``: model, device and settings. ``recipe``: how to train. ``tables``:
    the tables that the adapters are for. ``folder``: holds the adapters and the cache. ``log``: called with each line
    of progress. ``warn``: called once for each thing that training left out. ``models``: a model that is already
    loaded. Raises ``UsageError`` for an adapter that was trained on other data, with other settings or another recipe,
    ``BackboneError`` for one of another model.
    """
    models = models or Models(options.model)
    adapters = {}
    told: set[str] = set()
    for variant in trained_variants(tables):
        path = folder / f"{variant}.safetensors"
        settings = training_settings(options.settings, variant, tables)
        request = TrainRequest(data, replace(options, settings=settings), recipe, path, folder / "cache")
        if path.exists():
            facts = _read_same_training(request, models)
        else:
            facts = train_adapter(request, partial(_log_variant, log, variant), models=models)
        # All variants use the same data, so most warnings would be repeated.
        lines = list(describe_left_out(facts))
        if not facts["best_step"]:
            lines.append(f"{variant}: no step lowered the loss on the held-out videos: its trained rows are untrained")
        for line in lines:
            if line not in told:
                warn(line)
            told.add(line)
        adapters[variant] = path
    return adapters


def _log_variant(log: Callable[[str], None], variant: str, line: str) -> None:
    log(f"{variant}: {line}")


def training_settings(settings: Settings, variant: str, tables: Sequence[str]) -> Settings:
    """Return the settings to train an adapter with: the run's, with as many coefficients as the tables sweep over."""
    changed: dict[str, Any] = {"variant": variant}
    if "coefficients" in tables:
        swept = max(dict(row.settings)["max_coefficients"] for row in TABLES["coefficients"])
        if swept > settings.max_coefficients:
            changed["max_coefficients"] = swept
    return settings.with_values("ablate", **changed)


def _read_same_training(request: TrainRequest, models: Models) -> Mapping[str, Any]:
    """Return what an existing adapter records about its training.

    Raises ``UsageError`` if that differs from what was asked for, or is not recorded, ``BackboneError`` if it is for another
    model.
    """
    remedy = "remove it, or use another -o"
    try:
        adapter = load_adapter(request.output, models.facts)
    except BackboneError as error:
        raise BackboneError(error.message, remedy) from error
    made = adapter.training
    wanted = {"recipe": request.recipe.facts(), "data_sha256": request.data.sha256}
    differing = [key for key, value in wanted.items() if made.get(key) != value]
    if adapter.modules.shape.values != AMPLITUDE:
        differing.append("absorber (an earlier release's)")
    known = made.get("settings")
    if not isinstance(known, dict):
        differing.append("settings (not recorded)")
    else:
        settings = used_settings(request.options)
        differing += [key for key in sorted({*known, *settings}) if known.get(key) != settings.get(key)]
    if differing:
        raise UsageError(f"{request.output}: trained differently: differs in {', '.join(differing)}", remedy)
    return made
