"""The rows of an evaluation as CSV, for spreadsheets and plots of your own."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "method",
    "label",
    "adapter",
    "budget",
    "budget_tokens",
    "visual_tokens",
    "visual_tokens_max",
    "context_tokens",
    "num_frames",
    "encoded_tokens",
    "num_videos",
    "num_questions",
    "accuracy",
    "ci_low",
    "ci_high",
    "retention",
)
MEANS = ("accuracy", "ci_low", "ci_high", "retention")
COSTS = ("compress_s", "prefill_s", "ttft_s", "next_ttft_s", "kv_cache_bytes", "peak_memory_bytes")
OF_A_CATEGORY = ("num_questions", "accuracy", "ci_low", "ci_high")


def write_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV (RFC 4180): a header, and a line for each of the ``rows`` of ``scores.summarize``. What is unknown is
    empty. Columns of the mean over categories begin with ``mean_over_categories.``, those of a category with its name and
    a colon."""
    text = io.StringIO()
    writer = csv.writer(text)
    categories = list(rows[0]["by_category"])
    writer.writerow(
        [
            *COLUMNS,
            *(f"mean_over_categories.{key}" for key in MEANS),
            *COSTS,
            *(f"{category}: {key}" for category in categories for key in OF_A_CATEGORY),
        ]
    )
    for row in rows:
        writer.writerow(
            [
                *(row[key] for key in COLUMNS),
                *(row["mean_over_categories"][key] for key in MEANS),
                *(row[key] for key in COSTS),
                *(row["by_category"][category][key] for category in categories for key in OF_A_CATEGORY),
            ]
        )
    return text.getvalue()
