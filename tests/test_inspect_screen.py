"""``freres inspect`` on one screen: --all has what it leaves out, and its blocks are the numbers of the document."""

from __future__ import annotations

import io
import shutil

import pytest

from freres_cli.bundle.store import write_bundle
from freres_cli.cli.inspect import SHOWN_GOPS
from freres_cli.cli.output import BLOCKS, PLAIN_BLOCKS, SCREEN_COLUMNS, format_sparkline
from freres_cli.workflows.inspect import choose_gops
from tests.forged_bundles import edit_manifest, make_stretches, make_tokens, make_tracks, manifest_for, smooth_latents
from tests.runner import run_freres

LONG = "a name that goes on and on " * 6


def write(path, content):
    manifest = manifest_for(content)
    notes = [f"note {number}: {LONG}" for number in range(9)]
    manifest["source"] = {**manifest["source"], "file": f"{LONG}.mp4", "notes": notes}
    manifest["sampling"] = {**manifest["sampling"], "notes": notes}
    write_bundle(path, content, manifest)
    return path


@pytest.fixture(scope="module", params=["tracks", "stretches", "tokens"])
def path(request, tmp_path_factory):
    latents = smooth_latents(120)
    made = {"tracks": lambda: make_tracks(latents, 900, 30), "stretches": lambda: make_stretches(latents, 900)}
    content = made.get(request.param, lambda: make_tokens(latents, 900))()
    return write(tmp_path_factory.mktemp("screen") / f"{request.param}.pt", content)


def test_it_fits_one_screen_whatever_the_notes_and_the_number_of_gops(path):
    lines = run_freres("inspect", path).out.splitlines()
    assert 20 <= len(lines) <= 40 and max(map(len, lines)) <= SCREEN_COLUMNS
    assert "16 more: --all" in "\n".join(lines)


def test_all_shows_the_rest(path):
    document = run_freres("inspect", path, "--json").json
    shown = run_freres("inspect", path, "--all").out
    words = " ".join(shown.split())
    assert all(f"note {number}:" in words for number in range(9)) and "--all" not in words
    assert all(f"\n{key} " in shown for key in document["settings"])
    for gop in document["gops"] or ():
        assert f"\n{gop['start_s']:.2f} s" in shown


def test_the_gops_shown_are_the_worst_and_the_largest(path):
    gops = run_freres("inspect", path, "--json").json["gops"]
    if gops is None:
        assert "GoP at" not in run_freres("inspect", path).out
        return
    chosen = choose_gops(gops, SHOWN_GOPS)
    assert chosen == sorted(set(chosen)) and len(chosen) == SHOWN_GOPS < len(gops)
    kept = sorted(range(len(gops)), key=lambda g: gops[g]["energy_kept"])
    counts = [sum(gop["tokens_by_kind"].values()) for gop in gops]
    assert {*kept[: SHOWN_GOPS // 2], counts.index(max(counts))} <= set(chosen)
    shown = run_freres("inspect", path).out
    assert all((f"\n{gop['start_s']:.2f} s" in shown) == (place in chosen) for place, gop in enumerate(gops))


def test_blocks_are_the_numbers_of_the_document(path):
    over = run_freres("inspect", path, "--json").json["over_time"]
    lines = run_freres("inspect", path).out.splitlines()
    row = next(line for line in lines if line.startswith("tokens   ") and "at most" in line and line[9] in BLOCKS)
    assert row[9 : 9 + len(over["tokens"])] == format_sparkline(over["tokens"])
    assert len(over["edges_s"]) == len(over["tokens"]) + 1 == 71
    document = run_freres("inspect", path, "--json").json
    assert sum(over["tokens"]) == pytest.approx(document["visual_tokens"])
    for kind, values in over["tokens_by_kind"].items():
        assert sum(values) == pytest.approx(document["tokens_by_kind"][kind])
    assert (over["lost_energy"] is None) == (over["why_no_loss"] is not None) == (document["gops"] is None)


@pytest.mark.parametrize("make", [make_stretches, make_tokens])
def test_a_clip_of_one_frame_lasts_as_long_as_its_video(make, tmp_path):
    content = make(smooth_latents(1), 20)
    write_bundle(tmp_path / "b.pt", content, manifest_for(content))
    document = run_freres("inspect", tmp_path / "b.pt", "--json").json
    assert document["source"]["duration_s"] == 4.0
    assert document["over_time"]["edges_s"] == [0.0, 4.0]
    if document["stretches"] is not None:
        assert {(row["start_s"], row["end_s"]) for row in document["stretches"]["largest"]} == {(0.0, 4.0)}
    run = run_freres("report", tmp_path / "b.pt", "-o", tmp_path / "page.html")
    assert run.status == 0 and "0.00 to 4.00 s" in (tmp_path / "page.html").read_text(), run.err


def test_a_spark_grows_with_its_value(monkeypatch):
    assert format_sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert format_sparkline([0.0, 0.0]) == BLOCKS[0] * 2 and format_sparkline([]) == ""
    assert format_sparkline([3.0, 6.0, 1.5]) == format_sparkline([2.0, 4.0, 1.0])
    for encoding in ("ascii", "latin-1"):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        plain = format_sparkline([0, 1, 2, 3, 4, 5, 6, 7])
        monkeypatch.undo()
        assert plain == PLAIN_BLOCKS and plain.isascii()


def test_a_method_that_this_release_does_not_know_is_shown(path):
    """Bundles of tokens may be of any method: those of a later release are read as well."""

    def rename(manifest):
        manifest["settings"]["method"]["value"] = "newmethod"

    if path.stem == "tokens":
        other = path.with_name("other.pt")
        shutil.copy(path, other)
        edit_manifest(other, rename)
        assert "newmethod" in run_freres("inspect", other, "--all").out
        assert run_freres("report", other, "-o", path.with_name("page.html"), "--force").status == 0


@pytest.mark.parametrize("unknown", ["mean_shift_s", "max_shift_s"])
def test_a_shift_that_is_not_known_is_not_shown(path, unknown):
    def forget(manifest):
        known = {"context_tokens": 9, "text_overhead_tokens": 2, "moved_tokens": 5, "moved_outside": 0}
        manifest["tokens"].update(known, mean_shift_s=0.5, max_shift_s=0.5)
        manifest["tokens"][unknown] = None

    other = path.with_name("other.pt")
    shutil.copy(path, other)
    edit_manifest(other, forget)
    found = run_freres("inspect", other)
    assert found.status == 0 and "9 tokens without a question" in found.out and "tokens move" not in found.out
