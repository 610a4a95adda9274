"""``freres methods``: what --method and --methods accept."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from freres_cli.baselines.declaration import FUNCTIONS, Method
from freres_cli.baselines.registry import METHODS, PLUGINS
from freres_cli.baselines.unavailable import UNAVAILABLE
from freres_cli.cli import options
from freres_cli.cli.output import print_json, print_notes, print_result, print_table


def methods(
    every: Annotated[
        bool, typer.Option("--all", help="Also list published systems that are not here, and what they would take.")
    ] = False,
    json: options.Json = False,
) -> None:
    """List the compression methods.

    Shows what each method keeps, its source and how it differs from that, whether it is trained or needs the question,
    and whether it streams frames (its memory then does not grow with the clip). freres compress takes the methods that
    make bundles, freres eval takes all of them. Other packages may add methods, by entry points of the group freres.methods:
    freres(3) says how.
    """
    if json:
        document: dict[str, Any] = {"methods": [_describe(method) for method in METHODS.values()]}
        document["faults"] = list(PLUGINS.faults.values())
        if every:
            document["unavailable"] = [asdict(system) for system in UNAVAILABLE.values()]
        print_json("freres.methods/1", document)
        return
    rows = [
        (
            method.name,
            method.training,
            _yes(method.is_question_blind),
            ", ".join(method.needs) or "-",
            _yes(method.streams),
            _yes(method.makes_bundles),
            method.source,
        )
        for method in METHODS.values()
    ]
    print_table(("method", "training", "question-blind", "needs", "streams", "bundles", "source"), rows)
    print_result("")
    for method in METHODS.values():
        origin = f"; from {PLUGINS.origins[method.name]}" if method.name in PLUGINS.origins else ""
        print_result(f"{method.name}: {method.summary}; deviations: {method.deviations}{origin}")
    print_notes(PLUGINS.faults.values())
    if every:
        print_result("")
        print_table(("not here", "source"), [(system.name, system.source) for system in UNAVAILABLE.values()])
        print_result("")
        for system in UNAVAILABLE.values():
            print_result(f"{system.name}: {system.reason}; it would take {system.needs}")


def _describe(method: Method) -> dict[str, Any]:
    facts = {field.name: getattr(method, field.name) for field in fields(method) if field.name not in FUNCTIONS}
    facts |= {"needs": list(method.needs), "is_question_blind": method.is_question_blind}
    return {**facts, "origin": PLUGINS.origins.get(method.name)}


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
