"""``freres ask``: bundle + question -> answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freres_cli.cli import options
from freres_cli.cli.output import (
    format_seconds,
    format_share,
    print_error,
    print_json,
    print_json_line,
    print_line,
    print_notes,
    print_prompt,
    print_result,
    print_text,
    progress_bar,
)
from freres_cli.cli.questions import check_text, read_question, read_rows, read_stdin
from freres_cli.devices import choose_storage
from freres_cli.errors import ExitStatus, FreresError, UsageError, count_of
from freres_cli.imports import quick_imports
from freres_cli.pipeline.choices import MAX_NEW_TOKENS, check_revision
from freres_cli.presets import TEXT_AFTER

if TYPE_CHECKING:
    from freres_cli.backbones.generation import Sampling
    from freres_cli.pipeline.session import AskRequest, Session
    from freres_cli.records import Answer
    from freres_cli.workflows.ask import AskedRow


def ask(
    bundle: options.BundlePath,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="The question, or - to read stdin; without it, a prompt loop opens."),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option("--choices", metavar="A|B|...", help="Choose one of these; print the probability of each."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            readable=False,
            help="Answer a file of JSON lines, or - for stdin: question, choices, id.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum tokens in the answer.")
    ] = MAX_NEW_TOKENS,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", help="Sampling temperature, 0 or at least 0.001; 0 always takes the most likely token."
        ),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample from the most likely tokens that add up to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed for sampling.")] = 0,
    refine: Annotated[
        int | None,
        typer.Option("--refine", metavar="B", min=1, help="Use only B visual tokens, chosen for each question."),
    ] = None,
    where: Annotated[
        bool, typer.Option("--where", help="Also say which seconds of the clip the model attends to.")
    ] = False,
    save_prefix: Annotated[
        bool,
        typer.Option("--save-prefix", help="Keep the prefilled video beside the bundle, and read it the next time."),
    ] = False,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter: options.Adapter = None,
    text_after: Annotated[
        str | None,
        typer.Option(
            "--text-after", help="Position of the text after the video: max (as trained) or hf (transformers)."
        ),
    ] = None,
    device: options.DeviceName = None,
    dtype: options.Dtype = None,
    attn: options.Attention = None,
    kv_dtype: options.KvDtype = None,
    weight_dtype: options.WeightDtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer a question from a bundle alone; the video is not needed.

    The answer streams to stdout. Without a question, questions are read line by line and the video is prefilled only
    once.

    With --questions, all questions in a file are answered from one prefill, several at a time, and printed in file
    order, one line each. A row is a JSON object with the key question and, optionally, choices (a list of 2 to 26 options)
    and id: text or a whole number, a different one in each row. A row without an id has its line number.

    With --refine, each question keeps exactly B of the bundle's visual tokens: those that differ most from one another and
    are nearest to the question (the method cdpruner; see freres methods). They keep their positions and times. The video
    is then prefilled again for each question, and the time to the first token includes this, so refining pays where the
    bundle is large and the question is the only one. Questions of a file are then answered one at a time. If B is the
    number of tokens in the bundle or more, all are used, as without it.

    With --save-prefix, the prefilled video is kept in BUNDLE.prefix.safetensors, as large as its KV cache, and the next
    question with --save-prefix reads it. The answers are the same. The file is used only for the same bundle, model,
    precision, numbers of the cache, attention kernel, device and torch; else it is written again, and a note says so. Reading
    pays on a CPU. On a fast GPU, reading and checking the file may take longer than the prefill; a note then says that.

    --where adds which seconds of the clip got the most attention from the last token of the question, just before the
    answer begins: mean over heads, and over the layers from the middle to just before the end, next to the share of the
    tokens in those seconds, which count from the first frame of the file. Attention is not proof of evidence: a model may
    look at one place and answer from another.
    Models whose layers mostly keep a running state (Qwen3.5, MiniCPM-V) cannot say.
    """
    started = time.perf_counter()
    text = None if questions is not None else read_question(question, json)
    if questions is not None and (question is not None or choices is not None):
        raise UsageError("--questions: expected no QUESTION and no --choices with it", "put them in the file")
    if questions is not None and where:
        raise UsageError("--where: expected a single question, got --questions", "ask one at a time")
    if refine is not None and where:
        raise UsageError("--where needs every token of the bundle, and --refine leaves some out", "leave one out")
    if refine is not None and save_prefix:
        raise UsageError("--save-prefix keeps every token of the bundle, and --refine leaves some out", "leave one out")
    if text_after not in (None, *TEXT_AFTER):
        raise UsageError(f"--text-after: expected one of {', '.join(TEXT_AFTER)}, got {text_after}")
    listed = [check_text(choice.strip(), "--choices") for choice in choices.split("|")] if choices is not None else []
    from freres_cli.evaluation.questions import check_choices, check_length

    if choices is not None:
        check_choices(listed, "--choices", "|")
    check_length((text or "", *listed))
    check_revision(model, revision)
    storage = choose_storage(kv_dtype, weight_dtype)
    print_notes([options.LOADING], quiet)
    with quick_imports():
        from freres_cli.pipeline.models import find_device, find_dtype
        from freres_cli.pipeline.session import AskRequest, open_session

    sampling = _make_sampling(temperature, top_p, seed)
    manner = dict[str, Any](choices=listed, max_new_tokens=max_new_tokens, sampling=sampling, refine=refine)
    rows = None if questions is None else read_rows(questions)
    place, precision = find_device(device, attn), find_dtype(dtype)
    request = AskRequest(bundle, place, model, revision, precision, adapter, text_after, save_prefix, storage)
    session = open_session(request)
    session.notes = (*session.notes, *_describe_idle(manner, rows))
    print_notes(session.notes, quiet)
    if rows is not None:
        del manner["choices"]
        _answer_rows(session, rows, manner, json, quiet)
        return
    if text is None:
        _loop(session, manner, quiet, where)
    elif json:
        asked = time.perf_counter()
        answer = session.ask(text, **manner)
        cold_ttft_s = asked - started + (answer.ttft_s or 0.0)
        document = _document(answer, session, request, text, cold_ttft_s, refine)
        print_json("freres.ask/1", document | {"where": _locate(session, text, manner, quiet) if where else None})
    else:
        _answer(session, text, manner, quiet, where)


def _make_sampling(temperature: float, top_p: float, seed: int) -> Sampling:
    from freres_cli.backbones.generation import Sampling

    try:
        return Sampling(temperature, top_p, seed)
    except UsageError as error:  # which names its fields
        raise UsageError(f"--{error.message.replace('_', '-', 1)}", error.hint) from error


def _describe_idle(manner: dict[str, Any], rows: list[AskedRow] | None) -> Iterator[str]:
    """Yield a note on each flag that changes no answer. ``manner``: how is asked. ``rows``: of a file of questions."""
    sampling, chooses = manner["sampling"], bool(manner["choices"])
    if rows is not None:
        chooses = all(row.query.choices for row in rows)
    flags = {"--temperature": sampling.temperature != 0, "--top-p": sampling.top_p != 1, "--seed": sampling.seed != 0}
    if chooses:
        flags["--max-new-tokens"] = manner["max_new_tokens"] != MAX_NEW_TOKENS
    elif sampling.temperature:
        return
    why = "with options nothing is generated" if chooses else "at --temperature 0 the most likely token is always taken"
    yield from (f"{flag} has no effect: {why}" for flag, is_given in flags.items() if is_given)


def _answer(session: Session, question: str, manner: dict[str, Any], quiet: bool, where: bool = False) -> None:
    """Stream one answer to stdout, and ``where`` the model looked."""
    answer = session.ask(question, **manner, on_text=lambda piece: print_text(piece, end=""))
    print_result("")
    for choice, probability in (answer.choices or {}).items():
        print_line(f"{probability:6.1%}  {choice}")
    found = _locate(session, question, manner, quiet) if where else None
    if found is not None:
        _print_spans(found)
    print_notes([*answer.notes, _cost(answer)], quiet)


def _locate(session: Session, question: str, manner: dict[str, Any], quiet: bool) -> dict[str, Any] | None:
    """Return where the model looked, or say why that is not known."""
    from freres_cli.pipeline.query import Query
    from freres_cli.workflows.ask import locate_evidence

    found = locate_evidence(session, Query(question, manner["choices"]))
    if isinstance(found, str):
        print_notes([f"--where: {found}"], quiet)
        return None
    return found


SHOWN_SPANS = 3


def _print_spans(found: dict[str, Any]) -> None:
    """Print the spans with the most attention, the first one first."""
    spans = sorted(found["spans"], key=lambda span: -span["share"])[:SHOWN_SPANS]
    print_result(
        f"where the model looked, of its attention to the video ({format_share(found['visual_share'])} of all):"
    )
    for span in spans:
        share, count = format_share(span["share"]), format_share(span["token_share"])
        print_result(f"{share:>8}  {span['start_s']:.2f}-{span['end_s']:.2f} s, which has {count} of the tokens")


def _answer_rows(session: Session, rows: list[AskedRow], manner: dict[str, Any], json: bool, quiet: bool) -> None:
    """Print one answer per line, in file order."""
    from freres_cli.workflows.ask import answer_rows

    started, done = time.perf_counter(), 0
    refined = _count_refined(session, manner["refine"])

    with progress_bar("ask", quiet or json, "questions") as progress:

        def on_answer(row: AskedRow, answer: Answer) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(rows))
            if json:
                print_json_line("freres.answer/1", _row_document(row, answer, refined))
            else:
                print_line(" ".join(answer.text.split()))

        answers = answer_rows(session, rows, **manner, on_answer=on_answer)
    seconds = time.perf_counter() - started
    notes = dict.fromkeys(note for answer in answers for note in answer.notes)
    prefills = f"one prefill of {format_seconds(session.prefill_s)}"
    if refined is not None:
        prefills = "a prefill for each"
    asked = count_of(len(rows), "question")
    print_notes([*notes, f"{asked}, {prefills}, {format_seconds(seconds)} in all"], quiet)


def _count_refined(session: Session, refine: int | None) -> int | None:
    """Return how many tokens each question keeps of the bundle, ``None`` if it keeps all."""
    return refine if refine is not None and refine < len(session.tokens) else None


def _row_document(row: AskedRow, answer: Answer, refined: int | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "question": row.query.question,
        "answer": answer.text,
        "choices": answer.choices,
        "visual_tokens": answer.num_visual_tokens,
        "refined_tokens": refined,
        "context_tokens": answer.num_context_tokens,
        "new_tokens": answer.num_new_tokens,
        "finish_reason": answer.finish_reason,
        "notes": list(answer.notes),
    }


def _loop(session: Session, manner: dict[str, Any], quiet: bool, where: bool) -> None:
    """Answer one question per line until the input ends. A line that cannot be answered is reported, and the others still
    are; unless someone is typing, the exit status is then that of the first such line."""
    status = ExitStatus.DONE
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    while True:
        if is_terminal:
            print_prompt()
        line = read_stdin(line=True)
        if not line:
            break
        if not line.strip():
            continue
        try:
            _answer(session, check_text(line.strip(), "question"), manner, quiet, where)
        except FreresError as error:
            print_error(error)
            status = status or error.exit_status
    if status and not is_terminal:
        raise typer.Exit(status)


def _cost(answer: Answer) -> str:
    text = f"{count_of(answer.num_visual_tokens, 'visual token')}, {answer.num_context_tokens} in context, "
    text += f"first token after {format_seconds(answer.ttft_s)}"
    if answer.tpot_s is not None:
        text += f", then {format_seconds(answer.tpot_s)} each"
    return text + ("; cut at --max-new-tokens" if answer.finish_reason == "length" else "")


def _document(
    answer: Answer, session: Session, request: AskRequest, question: str, cold_ttft_s: float, refine: int | None
) -> dict[str, Any]:
    from freres_cli.bench.report import describe_environment
    from freres_cli.pipeline.prompt_text import describe_moves

    return {
        "bundle": str(request.bundle),
        "question": question,
        "answer": answer.text,
        "choices": answer.choices,
        "visual_tokens": answer.num_visual_tokens,
        "refined_tokens": _count_refined(session, refine),
        "context_tokens": answer.num_context_tokens,
        "text_overhead_tokens": session.text_overhead_tokens,
        **describe_moves(session.moves),
        "new_tokens": answer.num_new_tokens,
        "ttft_s": answer.ttft_s,
        "cold_ttft_s": cold_ttft_s,
        "tpot_s": answer.tpot_s,
        "load_s": session.load_s,
        "finish_reason": answer.finish_reason,
        "model": session.model.fingerprint,
        "text_after": session.text_after,
        "notes": [*session.notes, *answer.notes],
        **session.model.storage.describe(session.model.dtype),
        "environment": describe_environment(request.device, session.model.dtype),
    }
