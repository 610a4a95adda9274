"""``freres fidelity``: how much of a clip each method's tokens can rebuild, without a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.baselines.registry import BUNDLE_METHODS, OWN_BUNDLE_METHODS
from freres_cli.cli import options
from freres_cli.cli.compress import at_budgets, make_options
from freres_cli.cli.eval import print_losses
from freres_cli.cli.given import gather_flags_at_budgets
from freres_cli.cli.output import (
    format_share,
    print_json,
    print_line,
    print_notes,
    print_result,
    print_table,
    print_warning,
    progress_bar,
)
from freres_cli.cli.video_rows import tell_how_many
from freres_cli.pipeline.choices import choose_cells

if TYPE_CHECKING:
    from freres_cli.workflows.fidelity import FidelityRequest, FidelityResult


def fidelity(
    videos: Annotated[
        list[str], typer.Argument(metavar="VIDEO", help="Videos, folders of videos, or .txt lists of paths.")
    ],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help=f"Any of {', '.join(OWN_BUNDLE_METHODS)}.",
            autocompletion=options.complete_bundle_methods,
        ),
    ] = "adaptive,fre-res,uniform,lowres,evs,dtd",
    budgets: options.Budgets = "0.25,0.1,0.05",
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE", help="Draw a PNG of what is kept, and of what each second loses."),
    ] = None,
    force: options.Force = False,
    preset: options.PresetName = None,
    assignments: options.Assignments = None,
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how much of a video can be rebuilt from each method's tokens.

    Each video is decoded and encoded once, with the model's vision tower only. A reader then rebuilds every token of
    every frame from what a method keeps. Printed is the share of energy that is kept: 1 minus the squared distances
    between true and rebuilt tokens, over those between true tokens and the clip's mean token. A share below 0 means that
    the mean token in every place would be closer.

    hold shows each token over the frames and cells that it stands for, and then until the next token of its cell; linear
    runs in a straight line from one token of a cell to the next. A cell without any token shows the mean of the nearest
    frame that has some. In both columns fre-res is rebuilt from its tracks: anchors where they are kept, else pooled
    ones, plus the inverse DCT and the impulses. That is more than its tokens show a language model, so its figure is
    generous. Adapters have no part in it. A clip whose tokens are all equal has no energy; its share is 100 %.

    A video that cannot be used is reported, and counts for no mean; the exit status is then that of the first failure.

    This is not accuracy. It does not say what a language model makes of the tokens, whether it can use tokens that were
    averaged or moved, or what their text costs. Every unit of energy counts alike: small or brief things and written text
    hold little energy, so they may be lost at a high share, and noise may be kept. No share shows what the tower does
    not see. Shares of different models cannot be compared.
    """
    from freres_cli.video.listing import list_videos

    picture = options.check_plot(plot, force)
    paths = [options.check_path(video, "VIDEO") for video in videos]
    cells = choose_cells(methods, budgets, BUNDLE_METHODS)
    flags = gather_flags_at_budgets(assignments)
    listing = list_videos(paths)
    print_notes(listing.notes, quiet)
    chosen = at_budgets(
        make_options(flags, preset, model, revision, device=device, dtype=dtype, attn=attn), "fidelity", cells
    )
    from freres_cli.workflows.fidelity import FidelityRequest, measure_fidelity

    request = FidelityRequest(tuple(video for video, _ in listing.videos), cells, chosen, picture)
    with progress_bar("fidelity", quiet or json, "videos") as progress:
        result = measure_fidelity(request, progress)
    for item in result.failed:
        print_warning(f"failed: {item['message']}")
    print_losses(result.videos)
    print_notes(result.notes, quiet)
    if json:
        print_json("freres.fidelity/1", _describe(result, request))
    else:
        _print_rows(result)
        if picture is not None:
            print_line(f"plot: {picture.path}")
    if result.first_failure is not None:
        raise tell_how_many(result.first_failure, len(result.failed), len(request.videos))


def _describe(result: FidelityResult, request: FidelityRequest) -> dict[str, Any]:
    from freres_cli.bench.report import describe_environment

    return {
        "rows": result.rows,
        "videos": result.videos,
        "failed": result.failed,
        "plot": None if request.plot is None else str(request.plot.path),
        "model": result.model,
        "settings": {key: s for key, s in request.options.settings.record().items() if key != "budget_tokens"},
        "notes": list(result.notes),
        "environment": describe_environment(request.options.model.device, result.dtype),
    }


def _print_rows(result: FidelityResult) -> None:
    columns = ("method", "budget", "tokens", "hold", "linear")
    print_table(columns, [_cells(row) for row in result.rows])
    if len(result.videos) > 1:
        print_result("")
        print_table(
            ("video", *columns), [(video["video"], *_cells(row)) for video in result.videos for row in video["rows"]]
        )
    print_result("")
    what = (
        "1 video" if len(result.videos) == 1 else f"{len(result.videos)} videos, of which the first table has the means"
    )
    failed = f"; {len(result.failed)} failed" if result.failed else ""
    print_result(f"energy kept of the clip's latents, by reader; {what}{failed}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size = "-" if row["budget"] is None else str(row["budget"])
    return (
        row["method"],
        size,
        f"{row['visual_tokens']:.0f}",
        *[format_share(row[f"kept_{r}"]) for r in ("hold", "linear")],
    )
