"""``freres repack``: bundle -> smaller bundle."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from freres_cli.cli import options
from freres_cli.cli.output import format_bytes, print_json, print_notes, print_path
from freres_cli.errors import UsageError, count_of
from freres_cli.files import made_folder
from freres_cli.presets import DEEPSTACK


def repack(
    bundle: options.BundlePath,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE|DIR", help="The bundle to write, or a folder for it."),
    ],
    budget: options.Budget = None,
    quality: options.Quality = None,
    deepstack: options.DeepStack = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Cut a bundle to a smaller budget or quality, or drop its DeepStack rows.

    Needs neither the video nor the vision tower. A bundle of method adaptive becomes what compressing to that budget, or
    that quality, would have given; of a fre-res bundle the most important tokens of each kind are kept. Prints the new
    bundle's path.
    """
    if budget is None and quality is None and deepstack is None:
        raise UsageError("--budget, --quality, --deepstack: expected at least one, got none")
    place = options.check_path(output, "-o")
    if deepstack not in (None, *DEEPSTACK):
        raise UsageError(f"--deepstack: expected one of {', '.join(DEEPSTACK)}, got {deepstack}")
    from freres_cli.pipeline.cutting import Cut
    from freres_cli.workflows.repack import repack_bundle

    is_folder = options.is_folder(output)
    with made_folder(place) if is_folder else nullcontext():
        target = place / bundle.name if is_folder else place
        result = repack_bundle(bundle, target, Cut(budget, quality, deepstack), force=force)
    print_notes(result.notes, quiet)
    if json:
        from freres_cli.bench.report import describe_environment
        from freres_cli.devices import choose_device

        document = {
            "bundle": str(result.bundle),
            "bundle_bytes": result.bundle_bytes,
            "source_bundle": str(bundle),
            **result.manifest["tokens"],
            "notes": list(result.notes),
            "environment": describe_environment(choose_device("cpu")),
        }
        print_json("freres.repack/1", document)
        return
    tokens = result.manifest["tokens"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in tokens["tokens_by_kind"].items())
    print_notes(
        [f"{count_of(tokens['visual_tokens'], 'visual token')} ({kinds}), {format_bytes(result.bundle_bytes)}"], quiet
    )
    print_path(result.bundle)
