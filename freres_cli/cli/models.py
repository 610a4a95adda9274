"""``freres models``: what can be named with --model."""

from __future__ import annotations

from freres_cli.cli import options
from freres_cli.cli.output import format_bytes, print_json, print_result, print_table


def models(json: options.Json = False) -> None:
    """List what --model can name.

    Any local folder or hub checkpoint of a listed family works; those listed are the ones whose numbers are known.
    """
    from dataclasses import asdict

    from freres_cli.backbones.registry import FAMILIES, KNOWN_CHECKPOINTS
    from freres_cli.world.bundled_model import bundled_model_info

    bundled = bundled_model_info()
    if json:
        known = [
            {**asdict(c), "tokens_per_frame": {f"{w}x{h}": n for (w, h), n in c.tokens_per_frame.items()}}
            for c in KNOWN_CHECKPOINTS
        ]
        print_json("freres.models/1", {"families": list(FAMILIES), "bundled": bundled, "checkpoints": known})
        return
    trained = "trained" if bundled.get("freres_trained") else "untrained"
    rows = [("bundled", "qwen2_vl", "-", "-", "-", f"ships with freres, {trained}")]
    for c in KNOWN_CHECKPOINTS:
        rows.append(
            (
                c.model_id,
                c.family,
                str(c.tokens_per_frame.get((672, 672), "-")),
                format_bytes(c.kv_bytes_per_token),
                format_bytes(2 * c.width * (1 + c.num_deep_layers)),
                "real weights run" if c.is_tested else "architecture tested, real weights not run",
            )
        )
    print_table(("model", "family", "tokens at 672 px", "KV a token", "bundle a token", "state"), rows)
    print_result(f"families: {', '.join(FAMILIES)}; any folder or hub checkpoint of theirs can be named")
