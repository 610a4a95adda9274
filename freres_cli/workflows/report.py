"""bundle -> one page that shows what was kept, where it went and what was lost. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli import __version__
from freres_cli.bundle.store import StoredBundle, read_bundle
from freres_cli.errors import BackboneError, BundleError, UsageError
from freres_cli.files import InputFiles, check_destination, write_atomically
from freres_cli.method.allocation import (
    frame_edges_s,
    map_frames,
    map_in_space,
    share_of_interval,
    token_boxes,
)
from freres_cli.method.energy import report_energy
from freres_cli.page.document import make_page
from freres_cli.page.facts import Absorbed, Heat, PageFacts, Piece
from freres_cli.pipeline.adapters import NO_ADAPTER, adapter_file
from freres_cli.pipeline.cutting import Cut, cut_content
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.manifest import clip_end_s
from freres_cli.pipeline.tokens import load_tokens
from freres_cli.records import TOKEN_KINDS, VideoTokens
from freres_cli.stretches import Stretches
from freres_cli.tracks import GOP_STARTS, Tracks
from freres_cli.video.picture import draw_heat, encode_png
from freres_cli.video.thumbnails import make_thumbnails
from freres_cli.workflows.absorption import read_absorption, strongest_gops
from freres_cli.workflows.inspect import choose_gops, describe_bundle
from freres_cli.world.bundled_model import bundled_adapter

MAX_PIECES = 24  # shown closely, each with a thumbnail
MAX_COLUMNS = 2000  # of the pictures of rows and columns over time; a longer clip has several frames in each
MAX_ABSORBED = 12
MAX_POINTS = 16  # of a curve that the bundle holds
BUDGET_SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReportRequest:
    """What to show.

    ``bundle``: the file. ``output``: the HTML file to write. ``video``: for thumbnails. ``adapter``: for the absorber's
    maps, as ``adapters.choose_adapter`` takes it. ``force``: replace an existing file.
    """

    bundle: Path
    output: Path
    video: Path | None = None
    adapter: str | None = None
    force: bool = False


@dataclass(frozen=True)
class ReportResult:
    """The page that was written: its size, how many thumbnails it has, and what the user should know."""

    num_bytes: int
    num_thumbnails: int
    notes: tuple[str, ...]


def write_report(request: ReportRequest, progress: Progress | None = None) -> ReportResult:
    """Write the page of a bundle. ``progress``: called with the number of thumbnails made and of all.

    Raises ``UsageError`` for a page that cannot be written or a named adapter that the bundle has no use for,
    ``BundleError``, ``VideoError``, and ``BackboneError`` for a named adapter that does not fit.
    """
    check_destination(request.output, request.force)
    named = ("bundle", request.bundle), ("video", request.video), ("adapter", adapter_file(request.adapter))
    InputFiles(named).refuse(request.output)
    bundle = read_bundle(request.bundle)
    source = None if request.video is None else VideoSource(request.video)
    notes = () if source is None else _compare_video(source, bundle)
    facts = gather_facts(bundle, source, request.adapter, notes, progress)
    page = make_page(facts, __version__).encode()
    write_atomically(request.output, lambda file: file.write(page), force=request.force)
    return ReportResult(len(page), facts.num_thumbnails, notes)


def _compare_video(source: VideoSource, bundle: StoredBundle) -> tuple[str, ...]:
    if source.sha256 == bundle.manifest["source"]["sha256"]:
        return ()
    # The page may be passed on, so it names the file without its folder.
    return (f"{Path(source.name).name}: not the file that was compressed: thumbnails may show something else",)


def gather_facts(
    bundle: StoredBundle,
    source: VideoSource | None = None,
    adapter: str | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> PageFacts:
    """Return what the page of a bundle shows.

    ``bundle``: as read. ``source``: its video, for thumbnails. ``adapter``: as in ``ReportRequest``. ``notes``: about the
    video. ``progress``: as in ``write_report``. Raises what that does.
    """
    content = bundle.content
    absorber = _draw_absorber(bundle, adapter)
    inspected = describe_bundle(bundle)
    tokens = load_tokens(bundle, NO_ADAPTER).tokens
    boxes = token_boxes(tokens, content.pooled_grid if isinstance(content, Tracks) else None)
    spans = _find_spans(content)
    # Only GoPs can be more than are shown.
    chosen = list(range(len(spans))) if len(spans) <= MAX_PIECES else choose_gops(inspected["gops"], MAX_PIECES)
    edges_s = frame_edges_s(content.frame_seconds, clip_end_s(bundle.manifest))
    starts = [float(edges_s[spans[place][0]]) for place in chosen]
    pictures: Sequence[bytes | None] = [None] * len(chosen)
    said = "There are no thumbnails: name the video with --video."
    if source is not None:
        pictures = make_thumbnails(Path(source.name), source.info, starts, progress)
        said = " ".join(
            [f"{len(pictures)} thumbnails, each the first frame of its part.", *(f"Note: {n}." for n in notes)]
        )
    pieces, peak = _draw_pieces(tokens, boxes, edges_s, spans, chosen, pictures, inspected)
    rows, columns = (_draw_strip(boxes, tokens.grid, axis) for axis in (1, 2))
    quality, quality_of = _measure_quality(bundle)
    anchors, events = _find_events(content)
    return PageFacts(
        inspected=inspected,
        name=bundle.path.name,
        method=str(bundle.manifest["settings"]["method"]["value"]),
        pieces=pieces,
        piece_word="GoP" if isinstance(content, Tracks) else "equal part",
        num_pieces=len(spans),
        bounds_s=[(float(edges_s[low]), float(edges_s[high])) for low, high in spans],
        anchors_s=anchors,
        events_s=events,
        rows=rows,
        columns=columns,
        cell_peak=peak,
        scale=encode_png(draw_heat(torch.linspace(0, 1, 180)[None], 1.0)),
        quality=quality,
        quality_of=quality_of,
        absorber=absorber,
        thumbnails=said,
        num_thumbnails=sum(picture is not None for picture in pictures),
    )


def _find_spans(content: Any) -> list[tuple[int, int]]:
    """First frame, and the one after the last, of each GoP; or of equal parts of the clip."""
    num_frames = content.grid[0]
    if isinstance(content, Tracks):
        first = [0, *content.gop_anchor_frame.tolist()[1:], num_frames]
    else:
        count = min(MAX_PIECES, num_frames)
        first = [place * num_frames // count for place in range(count + 1)]
    return list(zip(first, first[1:], strict=False))


def _draw_pieces(
    tokens: VideoTokens,
    boxes: Tensor,
    edges_s: Tensor,
    spans: Sequence[tuple[int, int]],
    chosen: Sequence[int],
    pictures: Sequence[bytes | None],
    inspected: dict[str, Any],
) -> tuple[list[Piece], float]:
    """The pieces, and the most tokens on one cell of any of them."""
    grid, gops = tokens.grid[1:], inspected["gops"]
    shares = [share_of_interval(boxes, *spans[place]) for place in chosen]
    maps = [map_in_space(boxes, grid, share) for share in shares]
    peak = max(float(cells.max()) for cells in maps)
    pieces = []
    for place, share, cells, picture in zip(chosen, shares, maps, pictures, strict=True):
        sums = torch.zeros(len(TOKEN_KINDS), dtype=torch.float64).index_add_(0, tokens.kind.long(), share)
        low, high = spans[place]
        pieces.append(
            Piece(
                start_s=float(edges_s[low]),
                end_s=float(edges_s[high]),
                label="" if gops is None else gops[place]["start"],
                tokens_by_kind=dict(zip(TOKEN_KINDS, sums.tolist(), strict=True)),
                kept=None if gops is None else gops[place]["energy_kept"],
                cells=encode_png(draw_heat(cells, peak)),
                thumbnail=picture,
            )
        )
    return pieces, peak


def _draw_strip(boxes: Tensor, grid: tuple[int, int, int], axis: int) -> Heat:
    """The tokens of each row (``axis`` 1) or column (2) of the frame over time, a frame. Colours go by the square root, or
    anchors would leave the rest black."""
    count = min(MAX_COLUMNS, grid[0])
    edges = torch.linspace(0, grid[0], count + 1, dtype=torch.float64)
    each = map_frames(boxes, grid, edges, axis) / (grid[0] / count)
    # A few full frames would leave the others black: the scale ends where one in a hundred is above it.
    peak = float(torch.quantile(each.flatten()[:: max(1, each.numel() // 10**6)], 0.99)) or float(each.max())
    return Heat(encode_png(draw_heat(each.sqrt(), peak**0.5)), peak)


def _find_events(content: Any) -> tuple[list[float], list[float]]:
    """Seconds of the anchor frames, and of the events among them; stretches have cuts in place of both."""
    seconds = content.frame_seconds
    if isinstance(content, Tracks):
        starts = seconds[content.gop_anchor_frame]
        is_event = content.gop_start == GOP_STARTS.index("event")
        held = torch.isin(torch.arange(len(starts)), content.anchor_gop)
        return starts[held].tolist(), starts[is_event].tolist()
    return [], seconds[content.cut_frame].tolist() if isinstance(content, Stretches) else []


def _measure_quality(bundle: StoredBundle) -> tuple[list[tuple[int, float]] | str, str]:
    """What cuts of the bundle keep, and of what."""
    content = bundle.content
    if isinstance(content, Stretches):
        counts, lost = content.curve_tokens.tolist(), content.curve_loss.tolist()
        points = {count: content.quality_at(loss) for count, loss in zip(counts, lost, strict=True)}
        mine = [(count, quality) for count, quality in sorted(points.items()) if count < len(content)]
        wanted = (len(content) * place / MAX_POINTS for place in range(MAX_POINTS)) if mine else ()
        shown = {min(mine, key=lambda point: abs(point[0] - count)) for count in wanted}
        return [*sorted(shown), (len(content), content.quality)], "Share of the latents' energy"
    if not isinstance(content, Tracks):
        return "tokens of this method cannot be cut, and hold no measure of it; freres fidelity measures it", ""
    total = sum(content.num_tokens_by_kind().values())
    found = {}
    for budget in {max(1, round(share * total)) for share in BUDGET_SHARES}:
        cut, _, _ = cut_content(content, bundle.manifest, Cut(budget), str(bundle.path))
        assert isinstance(cut, Tracks)
        if (kept := report_energy(cut).clip_kept) is not None:
            found[budget] = kept
    if not found:
        return "no residual energy: every frame is an anchor, or nothing moves", ""
    return sorted(found.items()), "Share of the pooled residual energy"


def _draw_absorber(bundle: StoredBundle, adapter: str | None) -> Absorbed | str:
    """The absorber's maps, or why there are none. An adapter that the user named must fit."""
    is_named = adapter not in (None, NO_ADAPTER)
    if not isinstance(bundle.content, Tracks):
        why = f"method {bundle.manifest['settings']['method']['value']} has no absorber"
        if is_named:
            raise UsageError(f"--adapter {adapter}: {why}, so the page shows nothing of an adapter", "leave it out")
        return why
    try:
        maps, _, gamma = read_absorption(bundle, adapter, "--adapter")
    except (UsageError, BundleError, BackboneError) as error:
        if is_named:
            raise
        if isinstance(error, UsageError):
            return "without trained modules nothing is absorbed; name them with --adapter"
        # The page may be passed on, so it names files without their folders.
        return error.message.removeprefix(f"{bundle.path}: ").replace(f"{bundled_adapter().parent}/", "")
    peaks = [float(part.max()) for part in (maps.energy, maps.absorbed)]
    shown = strongest_gops(maps, MAX_ABSORBED).tolist()
    starts = bundle.content.frame_seconds[bundle.content.gop_anchor_frame].tolist()
    drawn = [
        (
            starts[gop],
            encode_png(draw_heat(maps.energy[gop], peaks[0])),
            encode_png(draw_heat(maps.absorbed[gop], peaks[1])),
        )
        for gop in shown
    ]
    return Absorbed(drawn, peaks[0], peaks[1], gamma, len(starts))
