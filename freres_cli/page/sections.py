"""The sections of the page. Each returns its parts; what a kind of bundle cannot show is one line that says why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freres_cli.errors import count_of, round_count
from freres_cli.page.charts import Axes, Series, curves, draw, legend, stacks, time_line
from freres_cli.page.elements import Html, data_uri, fold, table, tag
from freres_cli.page.facts import PageFacts, Piece

Parts = Sequence[Html]


def show_summary(facts: PageFacts) -> Parts:
    """Source, model and token counts."""
    report = facts.inspected
    source, model, sampling, grid = report["source"], report["model"], report["sampling"], report["geometry"]["grid"]
    edges = report["over_time"]["edges_s"]
    rows = [
        (
            "source",
            f"{source['file'] or 'frames'}, {source['codec'] or 'decoded'}, {source['width_px']}x"
            f"{source['height_px']}, {source['duration_s']:.2f} s, sha256 {source['sha256']}",
        ),
        ("model", f"{model['model_id']} ({model['family']}, {model['dtype']}), revision {model['revision'] or 'none'}"),
        ("method", facts.method),
        (
            "frames",
            f"{sampling['num_frames']} read ({sampling['mode']}) from {edges[0]:.2f} to {edges[-1]:.2f} s, grid "
            f"{grid[1]}x{grid[2]}, "
            f"{sampling['lost_s']:.2f} s lost to damage",
        ),
        (
            "tokens",
            f"{report['visual_tokens']} of at most {report['budget_tokens']}: "
            + ", ".join(f"{count} {kind}" for kind, count in report["tokens_by_kind"].items()),
        ),
        ("full", f"{report['full_tokens']} tokens, {report['compression']:.2f} times as many"),
        (
            "context",
            "not counted"
            if report["context_tokens"] is None
            else f"{report['context_tokens']} tokens without a question, {report['text_overhead_tokens']} of them text in it",
        ),
        ("bundle", f"{report['bundle_bytes']} bytes, {report['bytes_per_token']:.0f} a token"),
        *[("note", note) for note in (*source["notes"], *sampling["notes"])],
    ]
    return [table("What was kept, and of what", ("fact", "value"), rows)]


def show_time_line(facts: PageFacts) -> Parts:
    """Parts, anchors and events on one line."""
    edges = facts.inspected["over_time"]["edges_s"]
    counted = ", ".join(
        count_of(number, word)
        for number, word in (
            (facts.num_pieces, facts.piece_word),
            (len(facts.anchors_s), "anchor"),
            (len(facts.events_s), "event"),
        )
    )
    line = time_line("Time line", counted, (edges[0], edges[-1]), facts.bounds_s, facts.anchors_s, facts.events_s)
    if not facts.anchors_s:
        has_gops = facts.piece_word == "GoP"
        counted += f"; {'it holds no anchor tokens' if has_gops else 'it has no GoPs, so no anchor frames are marked'}"
    said = tag(
        "p",
        f"{counted}. Blocks are {facts.piece_word}s, a blue tick is an anchor frame, and a triangle is an event: a cut, "
        "or an anchor at one.",
    )
    if not facts.events_s:
        return [said, line]
    listed = fold("Events as a table", table("Events", ("event", "second"), enumerate_seconds(facts.events_s)))
    return [said, line, listed]


def enumerate_seconds(seconds: Sequence[float]) -> list[tuple[int, str]]:
    """Return a row for each time: its number, and the seconds."""
    return [(number, f"{second:.2f}") for number, second in enumerate(seconds, start=1)]


def show_tokens(facts: PageFacts) -> Parts:
    """How many tokens stand for each part of the clip, by kind."""
    over = facts.inspected["over_time"]
    edges, kinds = over["edges_s"], over["tokens_by_kind"]
    peak = max(over["tokens"])
    series = [Series(kind, kind, values) for kind, values in kinds.items() if any(values)]
    axes = Axes("seconds", "tokens", (edges[0], edges[-1]), (0.0, peak))
    each = (edges[-1] - edges[0]) / (len(edges) - 1)
    most = round_count(peak)
    said = f"Tokens in each {each:.3g} s of the clip, spread evenly over the time they stand for; at most {most}."
    columns = ("from s", "to s", *(one.name for one in series))
    rows = [
        (f"{start:.2f}", f"{end:.2f}", *(f"{one.values[place]:.1f}" for one in series))
        for place, (start, end) in enumerate(zip(edges, edges[1:], strict=False))
    ]
    return [
        tag("p", said),
        legend([(one.name, one.style) for one in series]),
        draw("Tokens over time", said, axes, *stacks(axes, edges, series)),
        fold("The same as a table", table("Tokens over time, by kind", columns, rows)),
    ]


def show_places(facts: PageFacts) -> Parts:
    """Rows and columns of the frame over time, as heat maps."""
    number = facts.inspected["geometry"]["grid"][0]
    parts = [
        tag(
            "p",
            f"Time runs from left to right over all {number} frames. The first picture has the rows of the frame, top to "
            "bottom, the second its columns, left at the top. Black holds no token, yellow the most; "
            "colours go by the square root.",
        ),
    ]
    for name, heat in (("Rows", facts.rows), ("Columns", facts.columns)):
        what = f"{name} of the frame over time; brightest from {round_count(heat.peak)} tokens a frame on"
        picture = tag("img", src=data_uri(heat.png, "png"), alt=what, class_="strip")
        parts.append(tag("div", picture, tag("p", f"{what}.", class_="faint"), class_="block"))
    note = facts.inspected["over_time"]["note"]
    if note is not None:
        parts.append(tag("p", f"{note[0].upper()}{note[1:]}."))
    return parts


def show_pieces(facts: PageFacts) -> Parts:
    """GoPs, or parts of the clip, with a thumbnail, and the cells their tokens stand for."""
    shown, number = len(facts.pieces), facts.num_pieces
    chosen = "" if shown == number else ": those that kept least, and those with most tokens"
    said = (
        f"{shown} of {count_of(number, facts.piece_word)}{chosen}. {facts.thumbnails} Each map has the "
        f"tokens on every cell of the frame, black for none, yellow for {round_count(facts.cell_peak)}: "
    )
    scale = tag("img", src=data_uri(facts.scale, "png"), alt="the colours from none to the most", class_="scale")
    cards = tag("ul", *(_card(piece) for piece in facts.pieces), class_="cards")
    return [tag("p", said, scale), cards]


def _card(piece: Piece) -> Html:
    total = sum(piece.tokens_by_kind.values())
    span = f"{piece.start_s:.2f} to {piece.end_s:.2f} s"
    pictures = [
        tag("img", src=data_uri(piece.cells, "png"), alt=f"where the {total:.0f} tokens of {span} are", class_="map")
    ]
    if piece.thumbnail is not None:
        picture = tag(
            "img", src=data_uri(piece.thumbnail, "jpeg"), alt=f"the frame at {piece.start_s:.2f} s", class_="thumb"
        )
        pictures.insert(0, picture)
    kinds = ", ".join(f"{count:.0f} {kind}" for kind, count in piece.tokens_by_kind.items() if round(count))
    kept = None if piece.kept is None else tag("p", f"{_percent(piece.kept)} of its pooled residual energy kept")
    heading = tag("p", tag("strong", span), f" {piece.label}")
    return tag("li", heading, tag("div", *pictures, class_="pictures"), tag("p", kinds or "less than one token"), kept)


def show_energy(facts: PageFacts) -> Parts:
    """Residual energy that was lost in each second."""
    over = facts.inspected["over_time"]
    if over["lost_energy"] is None:
        return [tag("p", f"Energy lost: {over['why_no_loss']}.")]
    edges = over["edges_s"]
    widths = [end - start for start, end in zip(edges, edges[1:], strict=False)]
    rates = [lost / width if width > 0 else 0.0 for lost, width in zip(over["lost_energy"], widths, strict=True)]
    if not any(rates):
        return [tag("p", "No energy is lost: every frame is an anchor, nothing moves, or all of it was kept.")]
    axes = Axes("seconds", "energy lost per second", (edges[0], edges[-1]), (0.0, max(rates)))
    worst = rates.index(max(rates))
    said = (
        f"Squared error of the pooled residuals, per second; the most, {max(rates):.4g}, from {edges[worst]:.2f} to "
        f"{edges[worst + 1]:.2f} s. This says how much motion was lost, not how well a model answers."
    )
    rows = [
        (f"{start:.2f}", f"{end:.2f}", f"{rate:.4g}") for start, end, rate in zip(edges, edges[1:], rates, strict=False)
    ]
    bars = stacks(axes, edges, [Series("lost", "lost", rates)])
    return [
        tag("p", said),
        draw("Energy lost per second", said, axes, *bars),
        fold("The same as a table", table("Energy lost per second", ("from s", "to s", "lost per s"), rows)),
    ]


def show_spectrum(facts: PageFacts) -> Parts:
    """Share of the residual energy in the first coefficients, and that of noise (the paper's Figure 1)."""
    energy = facts.inspected["energy"]
    if energy is None:
        return [tag("p", f"Method {facts.method} has no residuals, so there is no spectrum.")]
    if not energy["spectrum"]:
        return [tag("p", "No residual energy: every frame is an anchor, or nothing moves.")]
    clip, null = (
        Series(name, name, [100 * share for share in energy[key]])
        for name, key in (("clip", "spectrum"), ("null", "null_spectrum"))
    )
    numbers = list(range(1, len(clip.values) + 1))
    axes = Axes("first coefficients", "share of energy, %", (1.0, float(len(numbers))), (0.0, 100.0))
    said = (
        f"Share of the residual energy in the first coefficients of the temporal DCT. The first {len(numbers)} hold "
        f"{clip.values[-1]:.1f} %. The null is what independent noise frames would have: only what is above it is due to "
        "the clip."
    )
    rows = [(n, f"{a:.1f} %", f"{b:.1f} %") for n, a, b in zip(numbers, clip.values, null.values, strict=True)]
    return [
        tag("p", said),
        legend([("clip, solid line", "clip"), ("null, dashed line", "null")]),
        draw("Spectrum of the residuals", said, axes, *curves(axes, numbers, [null, clip])),
        table("Share of energy in the first coefficients", ("first", "clip", "null"), rows),
    ]


def show_quality(facts: PageFacts) -> Parts:
    """What a smaller budget would keep."""
    if isinstance(facts.quality, str):
        return [tag("p", f"Quality over budget: {facts.quality}.")]
    points = sorted(facts.quality)
    tokens, shares = [count for count, _ in points], [100 * share for _, share in points]
    low = min(shares)
    axes = Axes("visual tokens", "kept, %", (0.0, float(tokens[-1])), (low if low < 0 else 0.0, 100.0))
    said = f"{facts.quality_of}, at this budget and at smaller ones, to which freres repack can cut the bundle."
    lines = curves(axes, tokens, [Series("quality", "quality", shares)])
    rows = [(count, f"{share:.1f} %") for count, share in zip(tokens, shares, strict=True)]
    return [
        tag("p", said),
        draw("Quality over budget", said, axes, *lines),
        table("Quality over budget", ("tokens", "kept"), rows),
    ]


def show_absorber(facts: PageFacts) -> Parts:
    """Energy of each cell, and what the absorber took from it (the paper's Figure 4)."""
    found = facts.absorber
    if isinstance(found, str):
        return [tag("p", f"Absorber maps: {found}.")]
    cards = []
    for start, energy, absorbed in found.maps:
        pair = (
            tag("img", src=data_uri(energy, "png"), alt=f"energy of each cell at {start:.2f} s", class_="map"),
            tag(
                "img",
                src=data_uri(absorbed, "png"),
                alt=f"what was absorbed from each cell at {start:.2f} s",
                class_="map",
            ),
        )
        cards.append(tag("li", tag("p", tag("strong", f"GoP at {start:.2f} s")), tag("div", *pair, class_="pictures")))
    said = (
        f"Left, the energy of each cell's kept coefficients, yellow for {found.energy_peak:.3g}; right, how much the dynamic "
        f"tokens took from it, yellow for {found.absorbed_peak:.3g}. "
        f"{len(found.maps)} of {count_of(found.num_gops, 'GoP')}, those with the most energy; gamma {found.gamma:.4g}."
    )
    return [tag("p", said), tag("ul", *cards, class_="cards")]


def show_settings(facts: PageFacts) -> Parts:
    """Every setting with its source, and what was done to the bundle since."""
    report = facts.inspected
    rows = [(key, _plain(setting["value"]), setting["source"]) for key, setting in report["settings"].items()]
    history = [
        (number, step["verb"], _plain({k: v for k, v in step.items() if k != "verb"}))
        for number, step in enumerate(report["history"], start=1)
    ]
    return [
        table("Settings", ("setting", "value", "from"), rows),
        table("What was done to this bundle", ("step", "verb", "with"), history),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return "none" if value is None else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
