"""What the user should know about a compression, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from freres_cli.backbones.base import VisionEncoder
from freres_cli.baselines.registry import ADAPTIVE, FRE_RES, METHODS
from freres_cli.devices import Device
from freres_cli.errors import count_of
from freres_cli.pipeline.planning import CompressOptions, CompressPlan
from freres_cli.presets import BUNDLED, FULL, Settings
from freres_cli.video.ending import tells_damage

# If less than this share of the budget is used, a note says why.
FULL_SHARE = 0.98
# Clocks that differ a little, as 29.97 from 30 fps, repeat a frame now and then.
REPEATED_SHARE = 0.02


def find_damaged(noted: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those videos of which a part was lost. ``noted``: ``video``, ``lost_s`` and ``notes`` of each."""
    return [item for item in noted if item["lost_s"] > 0 or tells_damage(item["notes"])]


def kind_of_note(note: str) -> str:
    """Return a note without its numbers: many videos or questions have the same one about other numbers."""
    return re.sub(r"\d+(\.\d+)?", "#", note)


def describe_limits(model_id: str, is_from_world: bool, is_bundle: bool = False) -> tuple[str, ...]:
    """Return a note if the bundled model is used outside its world; nothing for other models. ``is_bundle``: the video is a
    bundle already, which no other model opens."""
    if model_id != BUNDLED or is_from_world:
        return ()
    told = "compress it with a real model" if is_bundle else "name a real model with --model"
    return (
        "the bundled model only knows its own world of drawn shapes ('freres world make'): its answers about any other "
        f"video mean nothing; {told}, such as Qwen/Qwen2-VL-2B-Instruct",
    )


def describe_times(methods: Iterable[str], device: Device) -> tuple[str, ...]:
    """Return a note if ``compress_s`` of some of these methods is time on a GPU and that of others is not; else nothing."""
    names = dict.fromkeys(methods)
    ours = [name for name in names if name in (ADAPTIVE, FRE_RES)]
    # What prunes in the decoder does so where the decoder is.
    others = [
        name
        for name in names
        if name not in ours and METHODS[name].has_budget and "decoder layers" not in METHODS[name].needs
    ]
    if not (device.is_cuda and ours and others):
        return ()
    return (f"compress_s: {', '.join(ours)} ran on {device.name}, {', '.join(others)} on the CPU: not to be compared",)


def describe_drop(num_deep_layers: int) -> str | None:
    """Return a note on the cost of dropping the DeepStack rows; ``None`` for a model without them."""
    if not num_deep_layers:
        return None
    return (
        f"the bundle holds no DeepStack rows: it is {1 + num_deep_layers} times smaller, the language model adds zeros "
        "in their place, and its answers change"
    )


def describe_plan(plan: CompressPlan, options: CompressOptions, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on what the budget and the settings led to. ``manifest``: that of the finished bundle."""
    tokens, model, settings = manifest["tokens"], manifest["model"], options.settings
    method = METHODS[options.method]
    if plan.is_lossless and method.has_budget:
        yield (
            f"the budget of {count_of(plan.budget_tokens, 'token')} fits all {plan.full_tokens} tokens of the clip: all are "
            "kept unchanged"
        )
    elif plan.quality is not None:
        yield from _describe_quality(plan, tokens)
    elif method.has_budget and tokens["visual_tokens"] < FULL_SHARE * plan.budget_tokens:
        yield f"{tokens['visual_tokens']} of {plan.budget_tokens} tokens used: {_explain_few(plan, options, manifest)}"
    if tokens["cuts_not_honoured"]:
        yield (
            f"{tokens['cuts_not_honoured']} of {tokens['cuts_found']} cuts have no anchor of their own: the budget has room "
            "for no more anchors"
        )
    if not method.streams:
        yield f"method {options.method} holds the latents of the whole clip in memory until its end"
    if settings.sample == "native" and settings.track_density > 1:
        yield "track_density has no effect with sample: native"
    if plan.residual_size is not None:
        small = plan.residual_size
        yield (
            f"residual_grid: frames between anchors were encoded at {small.grid_h}x{small.grid_w} tokens, anchors at "
            f"{plan.size.grid_h}x{plan.size.grid_w}"
        )
    elif settings.residual_grid != FULL:
        yield "residual_grid has no effect: every frame is encoded at the grid of the anchors"
    if plan.line_levels:
        count, num_frames = tokens["encoded_tokens"] // plan.size.num_tokens, manifest["sampling"]["num_frames"]
        yield (
            f"line_levels: {count} of {num_frames} frames were encoded; the latents of the others are interpolated on "
            f"the line between two of these, from which no colour in them is further than {plan.line_levels} levels"
        )
    elif settings.line_levels:
        yield "line_levels has no effect: every frame is encoded"
    if settings.trends == "keep" and options.method != ADAPTIVE:
        yield f"trends has no effect: method {options.method} has none"
    if settings.deepstack == "drop":
        yield describe_drop(model["num_deep_layers"]) or f"deepstack has no effect: {model['family']} has no such rows"


def describe_fit(plan: CompressPlan, encoder: VisionEncoder, settings: Settings) -> Iterator[str]:
    """Yield a note if frames lose their shape to a grid that was chosen. A family that takes one size only says so
    itself."""
    width, height, size = plan.info.width_px, plan.info.height_px, plan.size
    kept = encoder.frame_size(width, height, None, settings.tokens_per_frame)
    if size.fit(width, height) != "exact" and kept != size:
        yield (
            f"frames of {width}x{height} px are squeezed to a grid of {size.grid_h}x{size.grid_w} tokens; --grid auto keeps "
            f"their shape, here {kept.grid_h}x{kept.grid_w}"
        )


def describe_repeats(plan: CompressPlan) -> Iterator[str]:
    """Yield a note if the full-token model would read more frames than the clip shows: what repeats another costs a
    compressed clip next to nothing, and still counts among the full tokens."""
    if plan.sampling.mode == "fps" and plan.baseline_frames > (1 + REPEATED_SHARE) * plan.num_shown:
        yield (
            f"the clip shows {count_of(plan.num_shown, 'frame')}, which are read as {plan.baseline_frames}: repeated ones "
            "count among its full tokens, so the compression looks larger than it is; a lower sample_fps repeats none"
        )


def _explain_few(plan: CompressPlan, options: CompressOptions, manifest: Mapping[str, Any]) -> str:
    """Why a budget that the clip could fill was not."""
    num_frames = manifest["sampling"]["num_frames"]
    if num_frames < plan.num_frames:
        return f"they were planned for {plan.num_frames} frames, of which {num_frames} could be decoded"
    if options.method == FRE_RES:
        return "with these settings fre-res finds no more to keep"
    if options.method == ADAPTIVE:
        return "the clip has no more distinct ones"
    return f"method {options.method} kept no more"


def _describe_quality(plan: CompressPlan, tokens: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes if the quality that was asked for was not reached, or took more tokens than the model would read."""
    if tokens["visual_tokens"] > plan.full_tokens:
        yield (
            f"{tokens['visual_tokens']} tokens are more than the {plan.full_tokens} of the clip without compression, as "
            f"{plan.num_frames} frames were read in place of {plan.baseline_frames}: lower the quality, or name a budget"
        )
    if tokens["quality"] >= (plan.quality or 0.0):
        return
    if tokens["visual_tokens"] >= plan.budget_tokens:
        why = f"the budget of {count_of(plan.budget_tokens, 'token')} allows no more"
    else:
        why = f"of a clip this long, {tokens['visual_tokens']} stretches are kept while it is read"
    yield f"quality {tokens['quality']:.4f} in place of {plan.quality:g}: {why}"
