"""What readers check in every field and column, and what they ignore so that later releases can add to the format."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from freres_cli.bundle import version_2, version_3, version_4
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.errors import ExitStatus
from freres_cli.records import VideoTokens
from freres_cli.stretches import STRETCH_COLUMNS, Stretches
from freres_cli.tracks import COLUMNS, LATENT_DTYPES, TOKEN_COLUMNS, Tracks
from tests.forged_bundles import edit_manifest, forge, make_tokens, manifest_for, smooth_latents
from tests.forged_bundles import tracks as tracks
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, fails, run_freres

NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
REAL_TRACKS = [name for name, column in COLUMNS.items() if column.dtype != "int64"]
REAL_TOKENS = [name for name, column in TOKEN_COLUMNS.items() if column.dtype not in ("int64", "uint8")]
NUMBERS = [
    (section, name)
    for section, kinds in version_4.FIELDS.items()
    for name, field in kinds.items()
    if field.kind in ("whole", "number")
]
SETTINGS = [key for key, rule in version_4.SETTINGS.items() if rule.kind in (int, float)]
SECTIONS = [*version_4.FIELDS, "settings", "tensors"]


@pytest.fixture(scope="module")
def tokens():
    return make_tokens(smooth_latents())


@pytest.fixture
def path(tmp_path, tracks):
    write_bundle(tmp_path / "b.pt", tracks, manifest_for(tracks))
    return tmp_path / "b.pt"


# --- one table --------------------------------------------------------------------------------------------------------


def test_the_column_table_is_the_fields_of_tracks():
    assert [field.name for field in fields(Tracks)] == ["width", "grid", "pooled_grid", *COLUMNS]


def test_version_4_stores_the_columns_of_the_tables():
    tables = {"tracks": COLUMNS, "tokens": TOKEN_COLUMNS, "stretches": STRETCH_COLUMNS}
    assert {name: set(table) for name, table in tables.items()} == {n: set(t) for n, t in version_4.TENSORS.items()}
    assert set(version_3.TENSORS["tracks"]) - set(version_2.TENSORS["tracks"]) == {"gop_recipe"}
    assert set(version_4.TENSORS["stretches"]) - set(version_3.TENSORS["stretches"]) == {"trends"}
    assert all(version_4.TENSORS[kind] == version_3.TENSORS[kind] for kind in ("tracks", "tokens"))
    hidden = {"grid", "width", "boxes", "stretches"}
    assert set(TOKEN_COLUMNS) == {field.name for field in fields(VideoTokens)} - hidden
    assert set(STRETCH_COLUMNS) == {field.name for field in fields(Stretches)} - {"grid", "width"}
    of_tables = {
        column.dtype for table in (COLUMNS, TOKEN_COLUMNS) for column in table.values() if not column.is_latent
    }
    assert set(version_4.DTYPES) == of_tables | set(LATENT_DTYPES)


# --- numbers ----------------------------------------------------------------------------------------------------------


def check_not_finite(path, content, tensors, name, version):
    assert tensors[name].numel(), "there is something to forge"
    text = f"{path}: damaged bundle: {name}: expected finite numbers, got NaN or infinity"
    for value in NOT_FINITE:
        forged = tensors[name].clone()
        forged.view(-1)[-1] = value
        forge(path, content, {**tensors, name: forged}, version)
        with fails(ExitStatus.BUNDLE, text):
            read_bundle(path)
    check_failure(run_freres("inspect", path), ExitStatus.BUNDLE, text)


@pytest.mark.parametrize("version", [1, 2, 4])
@pytest.mark.parametrize("name", REAL_TRACKS)
def test_a_real_column_of_tracks_is_finite(tmp_path, tracks, name, version):
    check_not_finite(tmp_path / "b.pt", tracks, tracks.tensors(), name, version)


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("name", REAL_TOKENS)
def test_a_real_column_of_tokens_is_finite(tmp_path, tokens, name, version):
    check_not_finite(tmp_path / "b.pt", tokens, version_4.tensors_of(tokens), name, version)


def test_there_are_real_columns_of_every_table():
    assert {COLUMNS[name].table for name in REAL_TRACKS} == {column.table for column in COLUMNS.values()}
    assert len(REAL_TRACKS) == 14 and REAL_TOKENS == ["frame_seconds", "latents", "positions", "seconds", "energy"]


def check_refused(path, edit, text):
    edit_manifest(path, edit)
    check_failure(run_freres("inspect", path), ExitStatus.BUNDLE, f"{path}: damaged bundle: {text}")


@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_a_number_stored_as_text_is_refused(path, section, name):
    def edit(manifest):
        value = manifest[section][name]
        manifest[section][name] = "1" if value is None else str(value)

    check_refused(path, edit, f"{section}.{name}: expected a")


def test_numbers_stored_as_text_are_tried_in_every_section():
    assert {section for section, _ in NUMBERS} == set(version_4.FIELDS) and len(NUMBERS) > 25


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_s_number_stored_as_text_is_refused(path, key):
    def edit(manifest):
        manifest["settings"][key]["value"] = str(manifest["settings"][key]["value"] or 1)

    check_refused(path, edit, f"settings: {key}: expected a")


@pytest.mark.parametrize(
    ("section", "name", "value", "text"),
    [
        ("geometry", "grid", ["40", 8, 8], "geometry.grid: expected whole numbers, 3 of them"),
        ("geometry", "grid", [40, 8], "geometry.grid: expected whole numbers, 3 of them"),
        ("geometry", "pooled_grid", [4, "4"], "geometry.pooled_grid: expected whole numbers, 2 of them"),
        ("geometry", "pooled_grid", None, "geometry.pooled_grid: expected 2 whole numbers, got null"),
        ("geometry", "text_per_frame", [40], "geometry.text_per_frame: expected 40 frames in runs"),
        ("geometry", "text_per_frame", [39, 9], "geometry.text_per_frame: expected 40 frames in runs"),
        ("geometry", "text_per_frame", [20, 9, 1 << 62, 9], "geometry.text_per_frame: expected whole numbers"),
        ("geometry", "text_in_video", "3", "geometry.text_in_video: expected a whole number or null"),
        ("tokens", "context_tokens", 1.5, "tokens.context_tokens: expected a whole number or null"),
        ("tokens", "mean_shift_s", "0", "tokens.mean_shift_s: expected a number or null"),
        ("tokens", "tokens_by_kind", {"anchor": "300"}, "tokens.tokens_by_kind: expected whole numbers by name"),
        ("tokens", "budget_tokens", True, "tokens.budget_tokens: expected a whole number"),
        ("tokens", "budget_tokens", 300.0, "tokens.budget_tokens: expected a whole number"),
        ("tokens", "budget_tokens", 1 << 70, "tokens.budget_tokens: expected a whole number"),
        ("source", "made_by_world", "false", "source.made_by_world: expected true or false"),
        ("source", "sha256", 3, "source.sha256: expected text"),
        ("source", "notes", "none", "source.notes: expected a list of strings"),
        ("settings", "events", {"value": "true", "source": "flag"}, "settings: events: expected true or false"),
        ("settings", "anchors", 8, "settings.anchors: expected a value and its source"),
        ("tensors", "anchor_cell", {"shape": ["1"], "dtype": "int64"}, "anchor_cell: expected int64 ['1']"),
    ],
)
def test_a_field_of_another_kind_is_refused(path, section, name, value, text):
    check_refused(path, lambda manifest: manifest[section].update({name: value}), text)


@pytest.mark.parametrize(
    ("key", "value"),
    [("freres_version", 1), ("content", "pictures"), ("content", None), ("history", {}), ("model", [])],
)
def test_a_section_of_another_kind_is_refused(path, key, value):
    check_refused(path, lambda manifest: manifest.update({key: value}), "")


# --- room for later releases ------------------------------------------------------------------------------------------


def add_to_every_section(manifest):
    for section in (section for section in SECTIONS if section != "tensors"):
        manifest[section]["colour"] = "red"
    manifest["colour"] = {"of": "the sky"}


def add_a_setting(manifest):
    manifest["settings"]["shutter"] = {"value": 0.5, "source": "flag"}


@pytest.mark.parametrize("edit", [add_to_every_section, add_a_setting])
def test_additions_of_a_later_release_are_accepted(bundle, tmp_path, edit):
    path, small = tmp_path / "b.pt", tmp_path / "s.pt"
    path.write_bytes(bundle.read_bytes())
    edit_manifest(path, edit)
    assert path.read_bytes() != bundle.read_bytes()
    before, after = read_bundle(bundle), read_bundle(path)
    assert after.manifest["settings"] == before.manifest["settings"]
    assert all(torch.equal(getattr(after.tracks, n), t) for n, t in before.tracks.tensors().items())
    assert run_freres("inspect", path).status == run_freres("inspect", path, "--json").status == 0
    answers = [run_freres("ask", p, "what?", "--max-new-tokens", 4).out for p in (bundle, path)]
    assert answers[0] and answers[0] == answers[1]
    assert run_freres("repack", path, "--budget", 100, "-o", small).status == 0
    assert run_freres("inspect", small, "--json").json["visual_tokens"] == 100


@pytest.mark.parametrize("key", ["tau", "sample_fps", "sample_count"])
def test_a_setting_that_is_automatic_is_read_as_none(path, key):
    edit_manifest(path, lambda manifest: manifest["settings"].update({key: {"value": "auto", "source": "flag"}}))
    assert read_bundle(path).manifest["settings"][key] == {"value": None, "source": "flag"}
