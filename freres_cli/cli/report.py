"""``freres report``: a page that shows what is in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from freres_cli.cli import options
from freres_cli.cli.output import format_bytes, print_json, print_notes, print_path, progress_bar


def report(
    bundle: options.BundlePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", readable=False, help="The page.")] = Path(
        "report.html"
    ),
    video: Annotated[
        Path | None, typer.Option("--video", metavar="FILE", readable=False, help="The bundle's video, for thumbnails.")
    ] = None,
    adapter: options.Adapter = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a page that shows what a bundle kept, and where.

    One HTML file with everything in it: it opens offline, and runs no script. It shows a time line with the cuts of method
    adaptive, or the GoPs, anchors and events of fre-res; where the tokens went frame by frame, what smaller budgets keep,
    and every setting with its source; of fre-res also the energy lost per second, the spectrum of the residuals beside its
    null, and what the absorber took. What a method's bundle does not hold is said in its place.

    Needs no model. Without --video there are no thumbnails; with it, the video is decoded once, from the first to the last
    of at most 24 pictures. The absorber's maps need trained modules: those of --adapter, or the bundled model's own.
    """
    from freres_cli.workflows.report import ReportRequest, write_report

    request = ReportRequest(bundle, output, video, adapter, force)
    with progress_bar("report", quiet or json, "thumbnails") as progress:
        result = write_report(request, progress)
    print_notes(
        [*result.notes, f"{format_bytes(result.num_bytes)}, thumbnails: {result.num_thumbnails}"], quiet or json
    )
    if json:
        from freres_cli.bench.report import describe_environment
        from freres_cli.devices import choose_device

        facts = {"bundle": str(bundle), "report": str(output), "report_bytes": result.num_bytes}
        facts |= {"num_thumbnails": result.num_thumbnails, "notes": list(result.notes)}
        print_json("freres.report/1", {**facts, "environment": describe_environment(choose_device("cpu"))})
        return
    print_path(output)
