"""What an evaluation is asked for, what decides its answers, and notes on how they came about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from freres_cli import __version__
from freres_cli.backbones.base import LanguageModel
from freres_cli.backbones.weight_samples import digest_weights
from freres_cli.baselines.registry import PLUGINS
from freres_cli.devices import AS_COMPUTED
from freres_cli.errors import round_count
from freres_cli.evaluation.cells import Cell
from freres_cli.evaluation.questions import QuestionFile
from freres_cli.evaluation.results import REMEDY
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.notes import describe_times, kind_of_note
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.workflows.eval_files import NO_FILES, EvalFiles

MAX_ANSWER_TOKENS = 16
LIBRARIES = ("torch", "transformers", "av")  # numbers, prompts and pixels may differ from one release to the next


@dataclass(frozen=True)
class EvalRequest:
    """What to ask and how.

    ``questions``: the questions file. ``cells``: the methods and budgets to compare. ``options``: model, device and
    settings. ``output``: the results file, which is continued if it holds the same run; ``None`` keeps the results in
    memory. ``force``: start over if ``output`` holds something else, and replace ``files``. ``remedy``: the hint shown if
    it does and ``force`` is off. ``max_answer_tokens``: most tokens of a free answer. ``files``: what to write at the end.
    ``joined``: results files of other runs, whose answers are taken over where they are to these questions.
    """

    questions: QuestionFile
    cells: tuple[Cell, ...]
    options: CompressOptions
    output: Path | None = None
    force: bool = False
    remedy: str = REMEDY
    max_answer_tokens: int = MAX_ANSWER_TOKENS
    files: EvalFiles = NO_FILES
    joined: tuple[Path, ...] = ()

    @property
    def inputs(self) -> Iterator[tuple[str, Path | None]]:
        """The files that the run reads, as ``InputFiles`` takes them."""
        yield from self.questions.inputs()
        yield from (("file of --join", file) for file in self.joined)
        yield from (("adapter", cell.adapter) for cell in self.cells)
        yield from self.options.files


def describe_run(request: EvalRequest, models: Models) -> dict[str, Any]:
    """Return everything that decides the answers. A results file is continued only if all of it is equal.

    The weights are sampled, so that this takes no time; the fingerprint has the projector's alone. ``request``: what to ask.
    ``models``: both halves.
    """
    encoder, model = models.encoder, models.language_model
    settings = request.options.recorded_settings.values()
    del settings["budget_tokens"]  # each cell has its own
    protocol = request.questions.protocol
    return {
        **({} if protocol is None else {"scoring": request.questions.describe_scoring()}),
        "freres_version": __version__,
        **{name: version(name) for name in LIBRARIES},
        "questions_sha256": request.questions.sha256,
        "methods": [_describe_cell(cell) for cell in request.cells],
        "model": dict(model.fingerprint),
        "weights": {"tower_sha256": digest_weights(encoder.tower), "decoder_sha256": digest_weights(model.half)},
        "tokenizer_and_templates": models.checkpoint.small_files_sha256,
        "attention": [encoder.attention, model.attention],
        "device": request.options.model.device.name.partition(":")[0],  # shards have GPUs of their own
        "dtype": str(model.dtype).removeprefix("torch."),
        **({} if model.storage == AS_COMPUTED else asdict(model.storage)),
        "settings": settings,
        "max_answer_tokens": request.max_answer_tokens if protocol is None else protocol.max_new_tokens,
    }


def _describe_cell(cell: Cell) -> list[Any]:
    """What decides the tokens of a cell: of a method of another package, also which code that is."""
    origin = PLUGINS.origins.get(cell.method)
    return [cell.name, dict(cell.settings), cell.adapter_sha256, *([] if origin is None else [origin])]


def describe_answers(
    request: EvalRequest, model: LanguageModel, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return notes on the answers and what they were made from.

    ``request``: what was asked. ``model``: the language half. ``rows``: those of the videos. ``summary``: of the answers.
    """
    return (
        *_describe_unread(request.questions, rows),
        *describe_adapters(request.cells),
        *_describe_frames(rows, summary["rows"], request.options.settings.track_density),
        *describe_times((cell.method for cell in request.cells), request.options.model.device),
        *describe_oddities(summary["video_notes"]),
        *_describe_asking(rows),
        *_describe_drop(request, model),
    )


def describe_adapters(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a note on each adapter and the method that it is used with, as a default may have chosen it."""
    used = dict.fromkeys((cell.method, cell.adapter.name) for cell in cells if cell.adapter is not None)
    for method, name in used:
        yield f"{method} with adapter {name}"


def _describe_frames(
    videos: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], track_density: int
) -> Iterator[str]:
    """Yield a note if the tokens of one video are made from different numbers of frames: budgets alone do not make rows
    alike. ``videos``: their rows. ``rows``: those of the summary. ``track_density``: that of the settings."""
    if any(reads_other_frames(row.get("cells", ())) for row in videos):
        yield describe_frame_counts(rows, track_density, " (means over videos)")


def reads_other_frames(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether the tokens of one video's ``rows`` are made from different numbers of frames."""
    return len({row.get("num_frames") or None for row in rows} - {None}) > 1  # blind has none


def describe_frame_counts(rows: Sequence[Mapping[str, Any]], track_density: int, counted: str = "") -> str:
    """Return a note that says how many frames each of ``rows`` is made from, and what reads equal frames. ``counted``: what
    the numbers are, with a space before it."""
    counts: dict[str, set[float]] = {}
    names: dict[float, dict[str, None]] = {}
    known = [(row.get("label") or row["method"], row) for row in rows if row["num_frames"]]  # blind has none
    for name, row in known:
        counts.setdefault(name, set()).add(row["num_frames"])
    for name, row in known:
        names.setdefault(row["num_frames"], {})[name if len(counts[name]) == 1 else f"{name} {row['budget']}"] = None
    told = "; ".join(f"{round_count(count, 4)} by {', '.join(own)}" for count, own in sorted(names.items()))
    remedy = "; --set track_density=1 reads equal frames" if track_density > 1 else ""
    return f"rows differ in the frames they are made from{counted}: {told}{remedy}"


def describe_oddities(noted: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a note on the videos that were read with notes, of which it has the first."""
    odd = [item for item in noted if item["notes"]]
    if odd:
        more = f" (--json has those on all {len(odd)} videos)" if len(odd) > 1 else ""
        yield f"{odd[0]['video']}: {'; '.join(odd[0]['notes'])}{more}"


def _describe_asking(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a note for each kind of note that answers came with: the first of them, and how many rows have one."""
    cells = [(row["video"], cell) for row in rows for cell in row.get("cells", ())]
    found: dict[str, list[str]] = {}
    for video, cell in cells:
        name = cell["method"] if cell["budget"] is None else f"{cell['method']} {cell['budget']}"
        for kind, note in {kind_of_note(note): note for note in cell.get("notes", ())}.items():
            found.setdefault(kind, []).append(f"{video}, {name}: {note}")
    for told in found.values():
        alike = (
            f" (and alike in {len(told)} of {len(cells)} rows of a video, method and budget)" if len(told) > 1 else ""
        )
        yield f"{told[0]}{alike}"


def _describe_unread(file: QuestionFile, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a note on answers in which a benchmark's protocol finds no letter, if there are any."""
    if file.protocol is None:
        return ()
    by_id = {question.id: question for question in file.questions}
    answers = [
        item for row in rows for cell in row.get("cells", ()) for item in cell["answers"].items() if item[0] in by_id
    ]
    unread = sum(not file.protocol.read_letter(answer[0], by_id[own_id]) for own_id, answer in answers)
    if not unread:
        return ()
    counted = "each counts as a guess" if file.protocol.guesses else "each counts as wrong"
    return (f"answers that name no option: {unread} of {len(answers)}; {counted}",)


def _describe_drop(request: EvalRequest, model: LanguageModel) -> tuple[str, ...]:
    """Return a note on what dropping DeepStack rows means for the comparison, or nothing if they are kept."""
    if request.options.settings.deepstack != "drop":
        return ()
    if not model.num_deep_layers:
        return ("deepstack has no effect: the model has no such rows",)
    return ("deepstack is drop: method full keeps the DeepStack rows, the others have zeros in their place",)
