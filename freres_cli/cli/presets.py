"""``freres presets``: settings to start from."""

from __future__ import annotations

from typing import Annotated

import typer

from freres_cli.cli import options
from freres_cli.cli.output import print_json, print_result, print_table
from freres_cli.presets import KEYS, load_preset, preset_names


def presets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A preset or a .yaml file.", autocompletion=options.complete_preset),
    ] = None,
    json: options.Json = False,
) -> None:
    """List the presets, or print one of them, comments included.

    To make your own, run freres presets long-video > mine.yaml, edit the file, and pass --preset mine.yaml.
    """
    if name is not None:
        preset = load_preset(name)
        if json:
            values = {key: preset.values.get(key, rule.default) for key, rule in KEYS.items()}
            print_json("freres.preset/1", {"name": preset.name, "settings": values})
        else:
            print_result(preset.path.read_text(encoding="utf-8"), end="")
        return
    found = [load_preset(known) for known in preset_names()]
    if json:
        print_json("freres.presets/1", {"presets": {preset.name: dict(preset.values) for preset in found}})
        return
    columns = ("method", "budget_tokens", "grid", "description")
    rows = [(preset.name, *(str(preset.values[key]) for key in columns)) for preset in found]
    print_table(("preset", "method", "budget", "grid", "for"), rows)
