"""The benchmarks that can be read, and which one a folder holds."""

from __future__ import annotations

from pathlib import Path

from freres_cli.errors import UsageError
from freres_cli.evaluation.questions import QuestionFile, read_questions
from freres_cli.evaluation.readers.declaration import Benchmark
from freres_cli.evaluation.readers.egoschema import EGOSCHEMA
from freres_cli.evaluation.readers.local_copy import LocalCopy
from freres_cli.evaluation.readers.longvideobench import LONGVIDEOBENCH
from freres_cli.evaluation.readers.mvbench import MVBENCH
from freres_cli.evaluation.readers.nextqa import NEXTQA
from freres_cli.evaluation.readers.video_mme import VIDEO_MME

BENCHMARKS = {own.name: own for own in (MVBENCH, NEXTQA, EGOSCHEMA, LONGVIDEOBENCH, VIDEO_MME)}
# The file that freres world make writes.
QUESTIONS = "questions.jsonl"


def read_any_questions(path: Path, named: str | None = None, limit: int | None = None) -> QuestionFile:
    """Return the first ``limit`` questions of a JSON Lines file, or of the benchmark in a folder.

    ``named``: the benchmark, as NAME or NAME:PART; without it, the folder's files tell. Raises ``UsageError``.
    """
    if named is None and not path.is_dir():
        return read_questions(path, limit)
    copy = LocalCopy(path)
    benchmark, part = _choose(named, copy) if named is not None else (_recognize(copy), None)
    questions = benchmark.read(copy, part)
    places: dict[str, str] = {}
    for question in questions:
        if question.id in places:
            raise UsageError(f"{question.place}: id {question.id} is already used in {places[question.id]}")
        places[question.id] = question.place
    if not questions:
        raise UsageError(f"{path}: {benchmark.name}: holds no questions", f"expected {benchmark.layout}")
    read = f"{path}: read as {benchmark.name}{f', {part}' if part else ''}, scored by its own prompt and rule"
    asked, notes = tuple(questions[:limit]), (read, *copy.notes)
    return QuestionFile(path, copy.sha256, asked, benchmark.protocol, notes, copy.annotations)


def _choose(named: str, copy: LocalCopy) -> tuple[Benchmark, str | None]:
    name, colon, part = named.partition(":")
    if name not in BENCHMARKS:
        raise UsageError(
            f"--benchmark: expected one of {', '.join(BENCHMARKS)}, got {name!r}", f"{copy.root} was not read"
        )
    benchmark = BENCHMARKS[name]
    if colon and part not in benchmark.parts:
        expected = f"one of {', '.join(benchmark.parts)}" if benchmark.parts else "no part"
        raise UsageError(f"--benchmark: {name}: expected {expected}, got {part!r}", "see freres-benchmarks(7)")
    return benchmark, part or None


def _recognize(copy: LocalCopy) -> Benchmark:
    found = [benchmark for benchmark in BENCHMARKS.values() if benchmark.is_in(copy)]
    if len(found) != 1:
        names = f"name it with --benchmark: {', '.join(BENCHMARKS)}; freres-benchmarks(7) has their layouts"
        if not found and (copy.root / QUESTIONS).is_file():
            names = f"for questions of your own, name {copy.root / QUESTIONS}"
        got = "more than one: " + ", ".join(own.name for own in found) if found else "none that is known"
        raise UsageError(
            f"{copy.root}: expected the files of one benchmark, got {got}",
            names,
        )
    return found[0]
