"""What freres(7) says of the constants of adaptive Fre-Res is in the committed file that it names."""

from __future__ import annotations

from freres_cli.cli.benchmark.choices import CONSTANTS
from freres_cli.method import merging
from tests.test_manpages import read
from tests.test_readme_tables import read_part

PAGE = " ".join(read("man7/freres.7").split())
CHOICES = read_part("choices", "choices")
USUAL = "adaptive, as it is"


def points(difference: dict[str, float]) -> list[float]:
    return [round(100 * difference[key], 1) for key in ("difference", "ci_low", "ci_high")]


def test_other_constants_answer_as_many_but_for_one() -> None:
    found = {
        (level, own["method"].removeprefix("adaptive, "), own["budget"]): points(own)
        for level, part in CHOICES["sets"].items()
        for own in part["differences"]
        if own["minus"] == USUAL
    }
    assert len(found) == 12 and "in eleven of twelve comparisons" in PAGE
    certain = {key: value for key, value in found.items() if value[1] > 0 or value[2] < 0}
    assert certain == {("level_3", "exponent 1", 0.05): [3.0, 0.5, 5.7]}
    assert "at level 3 and a twentieth, a = 1 had 3.0 points more (0.5 to 5.7)" in PAGE
    assert [found[level, "latents alone", 0.1][::2] for level in ("level_1", "level_3")] == [[-1.5, 0.5]] * 2
    assert "it was 1.5 points less at a tenth, on both levels, with intervals that reach 0.5 above 0" in PAGE


def test_of_all_questions_another_exponent_answers_as_many() -> None:
    parts = CHOICES["all_categories"].values()
    found = [points(own) for part in parts for own in part["differences"]]
    assert len(found) == 6 and all(low <= 0 <= high for _, low, high in found)
    asked, clips = (sum(part[key] for part in parts) for key in ("num_questions", "num_videos"))
    most = max(abs(difference) for difference, _, _ in found)
    assert f"Of {asked:,} questions of all categories, on {clips} such clips" in PAGE
    assert f"differences of at most {most} points, all intervals include 0" in PAGE


def test_how_many_were_asked_and_that_rounds_lose_little_more() -> None:
    sets, order = CHOICES["sets"].values(), CHOICES["order"]
    asked, clips = (sum(part[key] for part in sets) for key in ("num_questions", "num_videos"))
    assert f"{clips} validation clips of levels 1 and 3, with {asked} questions" in PAGE
    most = max(own["rounds"] - own["one_at_a_time"] for own in order["means"])
    each = max(abs(own["rounds"] - own["one_at_a_time"]) for own in order["rows"])
    assert round(100 * most, 2) == 0.06 and round(100 * each, 1) <= 1.6
    assert "the mean error was within 0.06 % of the energy of that, and within 1.6 % on each" in PAGE


def test_what_was_measured_is_what_the_code_has() -> None:
    assert CHOICES["constants"] == CONSTANTS and CONSTANTS["as it is"] == {}
    assert (merging.COST_EXPONENT, merging.APART_S, merging.TREE_SHARE) == (0.5, 5.0, 0.25)
    assert "a = 1/2" in PAGE and "5 seconds or more apart" in PAGE and "a quarter as many" in PAGE
