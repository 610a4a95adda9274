"""Every figure in the README's tables of results is that of the committed file which the README names."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from tests.test_readme import README, RESULTS

BUDGETS = (0.476, 0.25, 0.1, 0.05)
# Where the methods were measured at 2.1x.
LEAST_COMPRESSED_AT_LEVEL_3 = [("all_methods_level_3", "at_2.1x"), ("world", "level_3")]
ABSORBER = "absorber, trained"
# The differences of the ablation by the rows that they compare.
ABLATION = {
    "absorber - anchors only": (ABSORBER, "anchors only"),
    "absorber - concatenation, trained alike": (ABSORBER, "concatenation, trained"),
    "absorber - inverse DCT, trained alike": (ABSORBER, "inverse DCT, trained"),
    "absorber - attention from the I-tokens, trained alike": (ABSORBER, "I-token queries, trained"),
    "absorber - sparse inverse DCT, trained alike": (ABSORBER, "sparse inverse DCT, trained"),
    "absorber, trained - untrained": (ABSORBER, "absorber, untrained"),
}


@functools.cache
def read_part(file: str, part: str | None) -> Any:
    document = json.loads((RESULTS / f"{file}.json").read_text())
    return document if part is None else document[part]


class Part:
    """The rows of one run in a committed file, as the README writes them."""

    def __init__(self, file: str, part: str | None) -> None:
        document = read_part(file, part)
        self.rows = {(row["label"] or row["method"], row["budget"]): row for row in document["rows"]}
        self.differences = {(d["method"], d["minus"], d["budget"]): d for d in document["differences"]}

    def accuracy(self, name: str, budget: float | None) -> str:
        part = self.rows[name, budget]["mean_over_categories"]
        value, low, high = (100 * part[key] for key in ("accuracy", "ci_low", "ci_high"))
        return f"{value:.1f} ({low:.1f}-{high:.1f})"

    def category(self, name: str, budget: float | None, category: str) -> str:
        return f"{100 * self.rows[name, budget]['by_category'][category]['accuracy']:.0f}"

    def difference(self, name: str, minus: str, budget: float) -> str:
        sign = 1 if (name, minus, budget) in self.differences else -1
        key = (name, minus, budget) if sign == 1 else (minus, name, budget)
        part = self.differences[key]["mean_over_categories"]
        ends = [sign * 100 * part[key] for key in ("ci_low", "ci_high")][::sign]
        return f"{sign * 100 * part['difference']:+.1f} ({ends[0]:.1f} to {ends[1]:.1f})"


def tables_after(marker: str) -> list[list[list[str]]]:
    """The tables below a text, each as a header and rows of cells."""
    below = README.partition(marker)[2]
    assert below, marker
    found = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in re.findall(r"(?m)(?:^\|.*\n)+", below)
    ]
    return [[table[0], *table[2:]] for table in found]


def plain(cell: str) -> str:
    """A cell without emphasis, and without the sign of a zero or of a positive number."""
    return re.sub(r"\+|-(?=0\.0\b)", "", cell.replace("*", ""))


def check(cells: list[str], wanted: list[str], name: str) -> None:
    assert [plain(cell) for cell in cells] == [plain(cell) for cell in wanted], name


@pytest.mark.parametrize(("marker", "part"), [("**Level 1**: 2,000", "methods"), ("**Level 3**: 2,000", "level_3")])
def test_levels_1_and_3(marker: str, part: str) -> None:
    own = Part("world", part)
    means, categories, differences = tables_after(marker)[:3]
    for name, *cells in means[1:]:
        if name == "every token":
            check(cells[:1], [own.accuracy("full", None)], name)
        elif name == "tokens, mean":
            check(cells, [f"{own.rows['adaptive', budget]['visual_tokens']:.0f}" for budget in BUDGETS], name)
        else:
            check(cells, [own.accuracy(name, budget) for budget in BUDGETS], name)
    columns = [(name, float(budget[0]) if budget else None) for name, *budget in map(str.split, categories[0][1:])]
    for title, *cells in categories[1:]:
        category, count = re.fullmatch(r"(\w+) \((\d+)\)", title).groups()  # type: ignore[union-attr]
        check(cells, [own.category(*column, category) for column in columns], title)
        assert own.rows["full", None]["by_category"][category]["num_questions"] == int(count)
    for title, *cells in differences[1:]:
        check(cells, [own.difference(*title.split(" - "), budget) for budget in BUDGETS], title)


def test_level_3_at_a_fiftieth() -> None:
    own = Part("world", "level_3_fiftieth")
    table = tables_after("**Level 3, at a fiftieth**")[0][1:]
    for name, *cells in table:
        key = ("full", None) if name == "every token" else (name, 0.02)
        wanted = [own.accuracy(*key), "" if name == "adaptive" else own.difference("adaptive", key[0], 0.02)]
        check(cells, wanted, name)
    assert len(table) == len({method for method, _ in own.rows} - {"blind"})


def test_level_2() -> None:
    own = Part("world", "level_2_full")
    for name, *cells in tables_after("**Level 2, with every token**")[0][1:]:
        means, differences = cells[:3], cells[3:]
        if name == "every token":
            check(means[:1], [own.accuracy("full", None)], name)
        else:
            check(means, [own.accuracy(name, budget) for budget in BUDGETS[1:]], name)
        if name != "adaptive":
            minus = "full" if name == "every token" else name
            check(differences, [own.difference("adaptive", minus, budget) for budget in BUDGETS[1:]], name)


def test_level_2_at_a_tenth_and_a_twentieth() -> None:
    own, budgets = Part("world", "level_2"), BUDGETS[2:]
    means, categories = tables_after("**Level 2**: 2,000")[:2]
    for name, *cells in means[1:]:
        wanted = [own.accuracy(name, budget) for budget in budgets]
        differences = ["", ""] if name == "adaptive" else [own.difference("adaptive", name, b) for b in budgets]
        check(cells, wanted + differences, name)
    columns = [(name, float(budget)) for name, budget in (title.split() for title in categories[0][1:])]
    for title, *cells in categories[1:]:
        category, count = re.fullmatch(r"(\w+) \((\d+)\)", title).groups()  # type: ignore[union-attr]
        check(cells, [own.category(*column, category) for column in columns], title)
        assert own.rows["adaptive", 0.1]["by_category"][category]["num_questions"] == int(count)


@pytest.mark.parametrize(
    ("level", "file", "least"),
    [(1, "all_methods", [("all_methods", None)]), (3, "all_methods_level_3", LEAST_COMPRESSED_AT_LEVEL_3)],
)
def test_every_method(level: int, file: str, least: list[tuple[str, str | None]]) -> None:
    own = Part(file, None)
    table = tables_after(f"**Every method, level {level}**")[0]
    for name, *cells in table[1:]:
        part = next(part for part in map(lambda names: Part(*names), least) if (name, 0.476) in part.rows)
        wanted = [part.accuracy(name, 0.476), *(own.accuracy(name, budget) for budget in BUDGETS[1:])]
        wanted += ["", ""] if name == "adaptive" else [own.difference("adaptive", name, b) for b in BUDGETS[2:]]
        check(cells, wanted, name)
    assert {row[0] for row in table[1:]} == {name for name, budget in own.rows if budget is not None}
    at_a_tenth = [own.rows[row[0], 0.1]["mean_over_categories"]["accuracy"] for row in table[1:]]
    assert at_a_tenth == sorted(at_a_tenth, reverse=True), "by the mean at a tenth"


@pytest.mark.parametrize(
    ("level", "file", "end", "budgets"),
    [
        (1, "all_methods", "At a twentieth,", BUDGETS),
        (3, "all_methods_level_3", "None of these is certainly", BUDGETS[1:]),
    ],
)
def test_the_methods_that_are_said_to_be_ahead_of_adaptive_are_all_of_them(
    level: int, file: str, end: str, budgets: tuple[float, ...]
) -> None:
    own = Part(file, None)
    told = README.partition(f"**Every method, level {level}**")[2].partition("|\n\n")[2].partition(end)[0]
    mean = {key: row["mean_over_categories"]["accuracy"] for key, row in own.rows.items()}
    certainly = set()
    for budget in budgets:
        ahead = {
            name for name, own_budget in mean if own_budget == budget and mean[name, budget] > mean["adaptive", budget]
        }
        for name in ahead:
            assert f"`{name}`" in told, (name, budget)
            if own.difference("adaptive", name, budget).partition("to ")[2].startswith("-"):
                certainly.add(name)
    assert set(re.findall(r"`([\w-]+)` is certainly ahead of `adaptive`", told)) == certainly


def test_the_adapter() -> None:
    parts = {"with": Part("world", "adapter"), "without": Part("world", "no_adapter")}
    for name, *cells in tables_after("**With the adapter.**")[0][1:]:
        check(cells, [parts[name].accuracy("fre-res", budget) for budget in BUDGETS[1:]], name)


def test_the_ablation() -> None:
    components, sweeps = Part("ablation", "components"), Part("ablation", "sweeps")
    parts, differences = tables_after("**What each part of Fre-Res is worth.**")[:2]
    swept = tables_after("Sweeps, with the absorber")[0]
    for own, table in ((components, parts), (sweeps, swept)):
        for name, *cells in table[1:]:
            if name == "every token":
                check(cells[:1], [own.accuracy("full", None)], name)
                continue
            pairs = [
                "/".join(own.category(name, b, category) for category in ("Transient", "Count")) for b in (0.25, 0.1)
            ]
            check(cells, [*(own.accuracy(name, budget) for budget in (0.25, 0.1)), ", ".join(pairs)], name)
    for title, *cells in differences[1:]:
        check(cells, [components.difference(*ABLATION[title], budget) for budget in (0.25, 0.1)], title)


def test_fidelity() -> None:
    rows = {(row["method"], row["budget"]): row for row in read_part("fidelity", "rows")}
    header, *table = tables_after("**Without a language model.**")[0]
    for budget, *cells in table:
        own = [rows[name, float(budget)] for name in header[1:]]
        check(cells, [f"{100 * max(row['kept_hold'], row['kept_linear']):.1f}" for row in own], budget)


def test_costs_of_other_methods() -> None:
    rows = cost_rows("peers")
    for part in ("peers_again", "peers_dtd", "peers_streams"):
        rows |= {name: row for name, row in cost_rows(part).items() if name not in ("uniform", "evs")}
    longer = cost_rows("peers_1800_again") | cost_rows("peers_1800_last") | cost_rows("peers_1800_streams")
    for name, *cells in tables_after("**What other methods cost**")[0][1:]:
        method, _, shorter = name.partition(" ")
        row = rows[method]
        seconds = row["compress_s"]
        check(
            cells[:2],
            [f"{seconds:.{1 if seconds < 100 else 0}f}", f"{row['peak_above_latents_bytes'] / 2**20:.0f}"],
            name,
        )
        assert row["num_frames"] == (18 if shorter else 180)
        if (row := longer.get(method)) is not None:
            gib = row["peak_above_latents_bytes"] / 2**30
            check(cells[2:], [f"{row['compress_s']:.0f}", f"{gib:.1f}"], name)
    assert {row[0].partition(" ")[0] for row in tables_after("**What other methods cost**")[0][1:]} == set(rows)


def cost_rows(part: str) -> dict[str, Any]:
    """The last row of each method in a part of ``pipeline.json``: that of a shorter clip, if it did not finish."""
    return {row["method"]: row for row in read_part("pipeline", part)["rows"]}
