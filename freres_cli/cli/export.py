"""``freres export``: bundle -> a file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from freres_cli.cli import options
from freres_cli.cli.output import format_bytes, print_json, print_notes, print_path
from freres_cli.errors import UsageError, count_of
from freres_cli.pipeline.choices import check_revision

TARGETS = ("vllm", "hf", "safetensors")


def export(
    bundle: options.BundlePath,
    target: Annotated[str, typer.Option("--to", metavar="|".join(TARGETS), help="What will read the file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", readable=False, help="The file to write.")],
    model: options.Model = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a bundle's tokens for another runtime, as one safetensors file.

    hf: the prompt up to the end of the video, for generate of transformers: ids, positions, and the encoder's outputs.
    vllm: the video's part of the prompt, for the plug-in that freres registers with vLLM, which also takes the bundle
    itself. safetensors: the visual tokens alone, with their times and positions.

    freres-serving(7) has the code that reads each. The tower and the language model are not loaded; hf and vllm need the
    model's config, tokenizer and projector, and a family whose prompt they can hold (hf: the Qwen families; vllm: Qwen2-VL,
    Qwen2.5-VL and Qwen3-VL).
    """
    if target not in TARGETS:
        raise UsageError(f"--to: expected one of {', '.join(TARGETS)}, got {target}")
    check_revision(model, revision)
    for flag, given in (("--model", model), ("--revision", revision)):
        if target == "safetensors" and given is not None:
            raise UsageError(f"{flag}: has no effect with --to safetensors, which needs no model", "leave it out")
    from freres_cli.devices import choose_device
    from freres_cli.workflows.export import ExportRequest, export_bundle

    device = choose_device("cpu")
    result = export_bundle(ExportRequest(bundle, output, target, device, model, revision, adapter, force))
    size = f"{count_of(result.num_visual_tokens, 'visual token')}, {format_bytes(result.num_bytes)}"
    print_notes([*result.notes, size], quiet)
    if json:
        from freres_cli.bench.report import describe_environment

        facts = {"bundle": str(bundle), "target": target, "output": str(output), "output_bytes": result.num_bytes}
        facts |= {"visual_tokens": result.num_visual_tokens, "tensors": result.shapes, "notes": list(result.notes)}
        print_json("freres.export/1", {**facts, "environment": describe_environment(device)})
        return
    print_path(output)
