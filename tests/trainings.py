"""Small trainings of adapters, as ``freres train`` runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.evaluation.cells import parse_budgets
from freres_cli.evaluation.questions import read_questions
from freres_cli.pipeline.adapters import TRAINED_METHODS
from freres_cli.pipeline.models import Models
from freres_cli.workflows.train_adapter import TrainRequest, train_adapter
from freres_cli.workflows.training_loop import Recipe
from tests.loaded_models import loaded_models


class Training:
    """A recipe and the flags that ask the command for it: ``run`` trains as the command does with ``flags``.

    ``budgets`` is as on the command line; ``recipe`` holds other fields of ``Recipe`` by name.
    """

    def __init__(self, budgets: str, **recipe: Any) -> None:
        self.budgets, self.recipe = budgets, recipe

    @property
    def flags(self) -> list[object]:
        names = {
            "num_steps": "--steps",
            "batch": "--batch",
            "questions_a_video": "--questions",
            "validate_every": "--validate-every",
            "validation_share": "--validation",
        }
        flags: list[object] = ["--budgets", self.budgets, "--device", "cpu"]
        return flags + [part for key, value in self.recipe.items() for part in (names[key], value)]

    def run(
        self,
        data: Path,
        output: Path,
        cache: Path,
        *,
        models: Models | None = None,
        log: Callable[[str], None] = lambda _: None,
        dtype: str | None = None,
        force: bool = False,
        **changed: Any,
    ) -> dict[str, Any]:
        """Train with ``models``, by default the bundled one. ``changed``: fields that differ from the recipe."""
        models = models or loaded_models(dtype=dtype)
        options = at_budgets(make_options({}, None, None, device="cpu", dtype=dtype), "train", trains=TRAINED_METHODS)
        recipe = Recipe(parse_budgets(self.budgets), **{**self.recipe, **changed})
        request = TrainRequest(read_questions(data, is_named=False), options, recipe, output, cache, force)
        return train_adapter(request, log, models=models)


def stop_at(step: int) -> Callable[[str], None]:
    """Return a log that acts as Ctrl-C when ``step`` is reported. By then the state of an earlier step is on disk."""

    def log(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise KeyboardInterrupt

    return log
