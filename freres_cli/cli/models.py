"""``freres models``: what --model accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from freres_cli.cli import options
from freres_cli.cli.output import format_bytes, print_json, print_result, print_table

if TYPE_CHECKING:
    from freres_cli.backbones.registry import KnownCheckpoint


def models(json: options.Json = False) -> None:
    """List what --model accepts.

    Any local folder or hub checkpoint of a listed family works. The table has the checkpoints whose numbers are known, in
    bfloat16. A dash means that a number is not known.
    """
    from freres_cli.backbones.registry import FAMILIES, KNOWN_CHECKPOINTS
    from freres_cli.world.bundled_model import FRAME_PX, GRID, bundled_model_info

    bundled = bundled_model_info()
    if json:
        _print_document(bundled)
        return
    size = f"{GRID**2} at {FRAME_PX}x{FRAME_PX}"
    rows: list[tuple[str, ...]] = [
        ("bundled", "qwen2_vl", size, "-", "-", "-", "ships with freres; knows only its world")
    ]
    rows += [_describe(known) for known in KNOWN_CHECKPOINTS]
    columns = ("model", "family", "tokens per frame", "KV per token", "bundle per token", "weights", "state")
    print_table(columns, rows)
    listed = {known.family for known in KNOWN_CHECKPOINTS}
    print_result(f"families: {', '.join(FAMILIES)}; --model takes any folder or hub checkpoint of these")
    if others := [family for family in FAMILIES if family not in listed]:
        print_result(f"no checkpoint is listed for: {', '.join(others)}")


def _describe(known: KnownCheckpoint) -> tuple[str, ...]:
    sizes = known.tokens_per_frame
    # The size for the paper's 24x24 grid if the family takes any frame size, else the only one.
    size = (672, 672) if (672, 672) in sizes else next(iter(sizes), None)
    return (
        known.model_id,
        known.family,
        "-" if size is None else f"{sizes[size]} at {size[0]}x{size[1]}",
        format_bytes(known.kv_bytes_per_token),
        format_bytes(known.bundle_bytes_per_token),
        format_bytes(known.weight_bytes),
        "real weights run" if known.is_tested else "architecture tested, real weights not run",
    )


def _print_document(bundled: dict[str, Any]) -> None:
    from dataclasses import asdict

    from freres_cli.backbones.registry import FAMILIES, KNOWN_CHECKPOINTS
    from freres_cli.bench.report import describe_environment
    from freres_cli.devices import choose_device

    checkpoints = [
        {
            **asdict(known),
            "bundle_bytes_per_token": known.bundle_bytes_per_token,
            "tokens_per_frame": {f"{w}x{h}": n for (w, h), n in known.tokens_per_frame.items()} or None,
        }
        for known in KNOWN_CHECKPOINTS
    ]
    document = {"families": list(FAMILIES), "bundled": bundled, "checkpoints": checkpoints}
    print_json("freres.models/1", {**document, "environment": describe_environment(choose_device("cpu"))})
