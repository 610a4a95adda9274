"""Flags that several verbs share, and their completion."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from freres_cli.baselines.registry import BUNDLE_METHODS, METHODS, OWN_BUNDLE_METHODS
from freres_cli.errors import UsageError
from freres_cli.evaluation.plots import PLOT_FLAG, PlotFile
from freres_cli.evaluation.readers.registry import BENCHMARKS
from freres_cli.files import InputFiles
from freres_cli.presets import BUNDLED, DEEPSTACK, preset_names


def check_path(text: str, name: str) -> Path:
    """Return the path that ``text`` names. Raises ``UsageError`` for an empty one, as an unset variable leaves it."""
    if not text:
        raise UsageError(f"{name}: expected a path, got an empty text")
    return Path(text)


def is_folder(output: str) -> bool:
    """Whether an output names a folder: one that exists, or any name with a slash at its end."""
    return output.endswith(os.sep) or os.path.isdir(output)  # noqa: PTH112 (os.path takes names too long for the system)


def check_plot(text: str | None, force: bool) -> PlotFile | None:
    """Return the picture that --plot and --force ask for, if any. Raises ``UsageError`` for one that cannot be drawn."""
    if text is None:
        if force:
            raise UsageError(
                f"--force: expected {PLOT_FLAG} as well, got none", f"name the picture with {PLOT_FLAG} FILE"
            )
        return None
    plot = PlotFile(check_path(text, PLOT_FLAG), force)
    plot.check()
    return plot


def refuse_inputs(plot: PlotFile | None, inputs: Iterable[tuple[str, Path | None]]) -> None:
    """Refuse a picture that would replace a file that the run reads. ``inputs``: as ``InputFiles`` takes them."""
    if plot is not None:
        InputFiles(inputs).refuse(plot.path, PLOT_FLAG)


def complete_preset(incomplete: str) -> list[str]:
    """Return the presets that start with what was typed."""
    return [name for name in preset_names() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Return the models that start with what was typed."""
    from freres_cli.cli.catalog import CHECKPOINT_IDS

    return [name for name in (BUNDLED, *CHECKPOINT_IDS) if name.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Complete the last method of a comma-separated list."""
    return _complete_last(incomplete, METHODS)


def complete_bundle_methods(incomplete: str) -> list[str]:
    """Complete the last method of a comma-separated list of methods that make bundles."""
    return _complete_last(incomplete, BUNDLE_METHODS)


def _complete_last(incomplete: str, names: Iterable[str]) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]


def complete_bundle_method(incomplete: str) -> list[str]:
    """Return the methods that make bundles and start with what was typed."""
    return [name for name in BUNDLE_METHODS if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress bar or notes.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output file.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="ID|DIR",
        help="Model: 'bundled', a folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.",
        autocompletion=complete_model,
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N. FRERES_DEVICE sets the default."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16. FRERES_DTYPE sets the default."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn", metavar="NAME", help="Attention kernels: auto, sdpa, eager or flash (16-bit models on CUDA)."
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option("--kv-dtype", metavar="NAME", help="Precision of the KV cache: auto, int8 or fp8 (lossy)."),
]
WeightDtype = Annotated[
    str | None,
    typer.Option(
        "--weight-dtype",
        metavar="NAME",
        help="Weights of the decoder's linear layers: auto, int8 or fp8 (lossy; need torchao).",
    ),
]
DeepStack = Annotated[
    str | None,
    typer.Option(
        "--deepstack",
        metavar="|".join(DEEPSTACK),
        help="Extra rows per token of DeepStack families (Qwen3-VL); drop: 4 times smaller, answers change.",
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME|FILE",
        help="Settings to start from: a shipped preset or a .yaml file.",
        autocompletion=complete_preset,
    ),
]
Benchmark = Annotated[
    str | None,
    typer.Option(
        "--benchmark",
        metavar="NAME[:PART]",
        help=f"What the folder holds: {', '.join(BENCHMARKS)}. PART is a task, split or length.",
    ),
]
Budget = Annotated[int | None, typer.Option("--budget", min=1, metavar="TOKENS", help="Upper limit on visual tokens.")]
Budgets = Annotated[
    str,
    typer.Option(
        "--budgets",
        metavar="SIZE,...",
        help="Shares of the full tokens (with a decimal point: 0.25, 1.0) or counts (without: 640).",
    ),
]
Quality = Annotated[
    float | None,
    typer.Option(
        "--quality",
        min=0.0,
        max=1.0,
        metavar="SHARE",
        help="Keep this share of the latents' energy, in as few tokens as possible (method adaptive).",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any preset key; use again to set more. See freres-preset(5)."),
]
BundleMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"Compression method: {', '.join(OWN_BUNDLE_METHODS)}.",
        autocompletion=complete_bundle_method,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        help="Ablation of method fre-res: absorber, anchors, temporal, concat, idct, iquery or sparse-idct.",
    ),
]
Fps = Annotated[float | None, typer.Option("--fps", help="Read this many frames per second.")]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        min=1,
        help="Sample this many frames; adaptive and fre-res read track_density times as many (most presets: 4).",
    ),
]
Grid = Annotated[
    str | None, typer.Option("--grid", metavar="ROWSxCOLS", help="Token grid of a frame, or auto (keep aspect).")
]
ResidualGrid = Annotated[
    str | None,
    typer.Option(
        "--residual-grid",
        metavar="ROWSxCOLS",
        help="Token grid of the frames between anchors (fre-res only), full (as the anchors) or half of each side.",
    ),
]
Start = Annotated[
    float | None,
    typer.Option("--start", min=0.0, metavar="SECONDS", help="Start this many seconds after the first frame."),
]
End = Annotated[
    float | None,
    typer.Option("--end", min=0.0, metavar="SECONDS", help="Stop this many seconds after the first frame."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse a video if what is read of it is damaged.")]
Decode = Annotated[
    str,
    typer.Option(
        "--decode",
        metavar="cpu|gpu",
        help="What decodes the video; gpu: NVDEC, for videos that it supports. The bundle is the same.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FILE|none",
        help="An adapter from freres train, for its own method only, or none for untrained tokens.",
    ),
]
# Importing torch and transformers takes seconds: verbs that do say so first.
LOADING = "loading torch"

# A file that may not be read is refused by whoever reads it, in our words, rather than by Typer: ``readable=False``.
BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", readable=False, help="A bundle that freres compress wrote.")
]
