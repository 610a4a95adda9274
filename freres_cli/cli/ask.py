"""``freres ask``: bundle + question -> answer."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.compress import warn_if_untrained
from freres_cli.cli.output import format_seconds, print_error, print_json, print_notes, print_result
from freres_cli.errors import FreresError, UsageError

if TYPE_CHECKING:
    from freres_cli.backbones.generation import Sampling
    from freres_cli.records import Answer
    from freres_cli.workflows.ask import Session


def ask(
    bundle: options.BundlePath,
    question: Annotated[
        str | None, typer.Argument(metavar="[QUESTION]", help="The question; - reads stdin; none opens a prompt loop.")
    ] = None,
    choices: Annotated[
        str | None, typer.Option("--choices", metavar="A|B|...", help="Options to choose from, with probabilities.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="FILE", help="Trained modules (safetensors).")
    ] = None,
    text_after: Annotated[
        str | None,
        typer.Option(
            "--text-after", help="Position of the text after the video: max (as trained) or hf (transformers)."
        ),
    ] = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer a question from a bundle alone; the video is not needed.

    The answer streams to stdout. Without a question, questions are read line by line and the video is prefilled only once.
    """
    started = time.perf_counter()
    if question is None and json:
        raise UsageError("--json: expected a question", "give the question, or - to read it from stdin")
    if text_after not in (None, "max", "hf"):
        raise UsageError(f"--text-after: expected max or hf, got {text_after}")
    options_list = choices.split("|") if choices is not None else []
    from freres_cli.backbones.generation import Sampling
    from freres_cli.devices import choose_device
    from freres_cli.workflows.ask import AskRequest, check_choices, open_session

    sampling = Sampling(temperature, top_p, seed)
    if choices is not None:
        check_choices(options_list)
    text = sys.stdin.read() if question == "-" else question
    if text is not None and not text.strip():
        raise UsageError("question: is empty", 'such as: freres ask bundle.pt "what moves first?"')
    chosen = choose_device(options.device_name(device))
    session = open_session(AskRequest(bundle, chosen, model, revision, options.dtype_name(dtype), adapter, text_after))
    warn_if_untrained(session.model.fingerprint.get("model_id"))
    print_notes(session.notes, quiet)
    if text is None:
        _loop(session, options_list, max_new_tokens, sampling, quiet)
        return
    on_text = None if json else lambda piece: print_result(piece, end="")
    asked = time.perf_counter()
    answer = session.ask(
        text.strip(), choices=options_list, max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text
    )
    if json:
        cold = asked - started + answer.ttft_s
        print_json("freres.ask/1", _document(answer, session, bundle, text.strip(), cold, chosen))
        return
    print_result("")
    _print_choices(answer)
    print_notes([*answer.notes, _cost(answer)], quiet)


def _loop(session: Session, choices: list[str], max_new_tokens: int, sampling: Sampling, quiet: bool) -> None:
    """Answer one question a line until the end of input."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        try:
            answer = session.ask(
                line.strip(),
                choices=choices,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                on_text=lambda piece: print_result(piece, end=""),
            )
        except FreresError as error:
            # One question that does not fit must not end the conversation on a terminal.
            if not is_terminal:
                raise
            print_error(error)
            continue
        print_result("")
        _print_choices(answer)
        print_notes([*answer.notes, _cost(answer)], quiet)


def _print_choices(answer: Answer) -> None:
    for choice, probability in (answer.choices or {}).items():
        print_result(f"{probability:6.1%}  {choice}")


def _cost(answer: Answer) -> str:
    text = f"{answer.num_visual_tokens} visual tokens, {answer.num_context_tokens} in context, "
    text += f"first token after {format_seconds(answer.ttft_s)}"
    if answer.tpot_s is not None:
        text += f", then {format_seconds(answer.tpot_s)} each"
    return text + ("; cut at --max-new-tokens" if answer.finish_reason == "length" else "")


def _document(
    answer: Answer, session: Session, bundle: Path, question: str, cold_ttft_s: float, device: Any
) -> dict[str, Any]:
    from freres_cli.bench.report import describe_environment

    return {
        "bundle": str(bundle),
        "question": question,
        "answer": answer.text,
        "choices": answer.choices,
        "visual_tokens": answer.num_visual_tokens,
        "context_tokens": answer.num_context_tokens,
        "new_tokens": answer.num_new_tokens,
        "ttft_s": answer.ttft_s,
        "cold_ttft_s": cold_ttft_s,
        "tpot_s": answer.tpot_s,
        "load_s": session.load_s,
        "finish_reason": answer.finish_reason,
        "model": session.model.fingerprint,
        "text_after": session.text_after,
        "notes": [*session.notes, *answer.notes],
        "environment": describe_environment(device, session.model.dtype),
    }
