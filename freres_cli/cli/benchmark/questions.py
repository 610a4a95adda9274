"""The part ``questions`` of the benchmark: several questions about one bundle answered together, against one at a time, and
against copies of the video's cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from freres_cli.backbones import batches
from freres_cli.bench.report import summarize_ratios, summarize_runs
from freres_cli.cli.benchmark.inputs import METHOD
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.query import Query
from freres_cli.pipeline.session import Session
from freres_cli.world.make import make_set

FEW_TOKENS, MANY_TOKENS = 322, 8192


def measure_questions(folder: Path, repeat: int = 5) -> dict[str, Any]:
    """Time 32 questions about a small bundle and about one of ``MANY_TOKENS``, answered in each way in turn."""
    (folder / "asked").mkdir()
    (folder / "long").mkdir()
    made = make_set(folder / "asked", "test", 8)
    (long,) = make_set(folder / "long", "test", 1, level=2)
    questions = [question for clip in made for question in clip.questions]
    kinds = {
        "choices": [Query(question.question, question.choices) for question in questions],
        "free_8_tokens": [Query(question.question) for question in questions],
    }
    small = Compressor(method=METHOD, budget_tokens=FEW_TOKENS, device="cpu").compress(folder / "asked" / made[0].file)
    large = Compressor(method="adaptive", budget_tokens=MANY_TOKENS, device="cpu").compress(folder / "long" / long.file)
    rows: dict[str, Any] = {}
    for size, bundle in (("", small), ("_long", large)):
        session = bundle.open(device="cpu")
        rows |= {f"{name}{size}": _time_queries(session, queries, repeat) for name, queries in kinds.items()}
    counts = {"visual_tokens": small.num_visual_tokens, "visual_tokens_long": large.num_visual_tokens}
    return {**counts, "warmup": 1, "runs": repeat, **rows}


def _time_queries(session: Session, queries: list[Query], repeat: int) -> dict[str, Any]:
    def ask_alone() -> None:
        for query in queries:
            session.ask(query.question, choices=query.choices, max_new_tokens=8)

    def ask_together() -> None:
        session.ask_many(queries, max_new_tokens=8)

    def ask_of_copies() -> None:
        with patch.object(batches, "can_share", lambda _: False):
            ask_together()

    ways = {"one_at_a_time": ask_alone, "together": ask_together, "of_copies": ask_of_copies}
    runs = [{name: _time(run) for name, run in ways.items()} for _ in range(repeat + 1)][1:]
    seconds = {name: [run[name] for run in runs] for name in ways}
    return {
        "num_questions": len(queries),
        **{f"{name}_s": summarize_runs(own) for name, own in seconds.items()},
        "together_over_one_at_a_time": summarize_ratios(seconds["together"], seconds["one_at_a_time"]),
        "together_over_of_copies": summarize_ratios(seconds["together"], seconds["of_copies"]),
    }


def _time(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
