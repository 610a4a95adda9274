"""``freres verify``: whether freres computes what transformers computes, on your model and device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.output import print_json, print_notes, print_result, print_table
from freres_cli.errors import BackboneError
from freres_cli.presets import BUNDLED

if TYPE_CHECKING:
    from freres_cli.workflows.verify import Law, Verification


def verify(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="'bundled', a folder, or a hub id.", autocompletion=options.complete_model
        ),
    ] = BUNDLED,
    revision: options.Revision = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that freres computes what transformers computes, on your model and device.

    Draws a clip of 4 small frames, runs it through the stock model and through freres, and compares pixels, visual tokens,
    prompt, logits and greedy answer with every token kept, and the answer from some tokens with that of the stock model
    with the others masked. Each line has the largest difference and the most that rounding can explain. The exit status
    is 5 if one does not hold. The two models are loaded one after the other.
    """
    from freres_cli.bench.report import describe_environment
    from freres_cli.pipeline.models import Models, make_source
    from freres_cli.workflows.verify import verify_model

    source = make_source(model, device, dtype, revision, attn)
    done = verify_model(Models(source), lambda text: print_notes([text], quiet or json))
    failed = done.failed
    if json and not failed:
        environment = describe_environment(source.device, done.dtype)
        print_json("freres.verify/1", {**_document(done), "environment": environment})
    elif not json:
        print_table(("law", "state", "largest difference", "tolerance", "what"), [_row(law) for law in done.laws])
        _print_rest(done, source.device.description)
    if failed:
        broken = "; ".join(_explain(law) for law in done.laws if law.state == "fails")
        raise BackboneError(f"{model}: {broken}", "do not trust answers of this model here; please report this")


def _row(law: Law) -> tuple[str, ...]:
    numbers = ("-" if value is None else f"{value:.3g}" for value in (law.difference, law.tolerance))
    return (law.name, law.state, *numbers, law.what)


def _print_rest(done: Verification, device: str) -> None:
    for law in done.laws:
        if law.reason:
            print_result(f"{law.name}: {law.reason}")
    frames, rows, columns = done.grid
    name = str(done.dtype).removeprefix("torch.")
    tokens = "" if done.num_tokens is None else f", {done.num_tokens} tokens in the prompt"
    print_result(f"{done.family} in {name} on {device}; {frames} frames of {rows}x{columns} tokens{tokens}")
    if name != "float32":
        print_result(f"the tolerance is wide because {name} rounds in every layer; --dtype float32 is the sharper test")


def _explain(law: Law) -> str:
    values = "" if law.difference is None else f": expected at most {law.tolerance:.3g}, got {law.difference:.3g}"
    return f"{law.name} differ from the stock model's{values}" + (f" ({law.reason})" if law.reason else "")


def _document(done: Verification) -> dict[str, Any]:
    return {
        "model": done.model,
        "family": done.family,
        "dtype": str(done.dtype).removeprefix("torch."),
        "grid": list(done.grid),
        "context_tokens": done.num_tokens,
        "laws": [vars(law) for law in done.laws],
    }
