"""Whether compressing a video again would give the same bundle, judged by the video's hash, the model and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freres_cli.backbones.base import EncoderIdentity
from freres_cli.baselines.registry import PLUGINS
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.video.ending import tells_damage

MODEL_FACTS = ("revision", "config_sha256", "projector_sha256")


def find_differences(
    manifest: Mapping[str, Any], video_sha256: str, model: EncoderIdentity, options: CompressOptions
) -> list[str]:
    """Return the names of the facts that differ; an empty list if none do.

    ``manifest``: the bundle's. ``video_sha256``: hash of the video file. ``model``, ``options``: what the video would be
    compressed with.
    """
    recorded, sampling = manifest["model"], manifest["sampling"]
    made: Mapping[str, Any] = next(iter(manifest["history"]), {})
    dtype = str(model.dtype).removeprefix("torch.")
    pairs = {
        "video": (manifest["source"]["sha256"], video_sha256),
        "model": (
            [recorded[fact] for fact in MODEL_FACTS],
            [model.fingerprint.get(fact) for fact in MODEL_FACTS],
        ),
        "dtype": (recorded["dtype"], dtype),
        # Earlier releases did not record these two.
        "attention": (recorded["attention"] or model.attention, model.attention),
        "image processor": (recorded["pixels_sha256"] or model.pixels_sha256, model.pixels_sha256),
        "start": (sampling["start_s"] or 0, options.start_s or 0),
        "end": (sampling["end_s"], options.end_s),
        "method": (manifest["settings"]["method"]["value"], options.method),
        "code of the method": (made.get("method_from"), PLUGINS.origins.get(options.method)),
    }
    values = options.settings.values()
    del values["method"]  # the options' own decides
    stored = {key: setting["value"] for key, setting in manifest["settings"].items()}
    # Where no budget limits the tokens, a bundle records how many there are, and that the method decided it.
    if manifest["settings"]["budget_tokens"]["source"].startswith("method "):
        stored["budget_tokens"] = None
    if not options.has_budget:
        values["budget_tokens"] = None
    pairs |= {key: (stored[key], value) for key, value in values.items()}
    found = [name for name, (stored, wanted) in pairs.items() if stored != wanted]
    if any(step.get("verb") != "compress" for step in manifest["history"]):
        found.append("history")
    if options.strict and (sampling["lost_s"] > 0 or tells_damage(sampling["notes"])):
        found.append("strict")
    return found
