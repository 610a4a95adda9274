"""Every schema that ever existed: small bundles from earlier releases still give the answers they gave then."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from freres_cli import load_bundle
from freres_cli.bundle import schema, version_1, version_2, version_3, version_4
from freres_cli.bundle.checks import later_settings
from freres_cli.bundle.schema import encode_manifest
from freres_cli.bundle.store import read_bundle
from freres_cli.errors import BundleError
from freres_cli.pipeline.models import Models, make_source
from freres_cli.presets import KEYS, Key
from freres_cli.stretches import Stretches
from freres_cli.tracks import COLUMNS, LATENT, REFINED, Column, Tracks, complete_columns
from tests.runner import run_freres

FOLDER = Path(__file__).parent / "formats"
ANSWERS = json.loads((FOLDER / "answers.json").read_text())
QUESTION, CHOICES = "what moves?", ("a square", "a ring", "nothing")
# Of every file: once written, it must stay as it is.
SHA256_OF_ALL = "677cd9d765d1a10adcc067a5175eb50eb487d4ba8ff96ac9fdf47efcbff9ad25"


@pytest.fixture(scope="module")
def models():
    source = make_source(str(FOLDER / "model"), "cpu", "float32")
    loaded = Models(source)
    return Models(source, language_model=loaded.language_model)


@pytest.fixture(params=sorted(ANSWERS))
def name(request):
    return request.param


def check_answers(bundle, models, told):
    tokens = bundle.tokens()
    assert len(tokens) == told["visual_tokens"]
    torch.testing.assert_close(tokens.positions, torch.tensor(told["positions"]), atol=1e-5, rtol=0)
    session = bundle.open(model=models.source.name, models=models)
    assert session.ask(QUESTION, max_new_tokens=8).text == told["answer"]
    chosen = session.ask(QUESTION, choices=CHOICES)
    assert chosen.choices == pytest.approx(told["choices"], abs=1e-5)


def test_the_files_are_those_that_were_written():
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.pt")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == SHA256_OF_ALL
    assert {path.stem for path in FOLDER.glob("*.pt")} == set(ANSWERS)


def test_every_version_has_files():
    versions = {read_bundle(path).schema_version for path in FOLDER.glob("*.pt")}
    assert versions == set(schema.READERS) and max(versions) == schema.SCHEMA_VERSION


def test_a_bundle_gives_the_answers_it_gave(name, models):
    check_answers(load_bundle(FOLDER / f"{name}.pt"), models, ANSWERS[name])


def test_a_bundle_cut_to_ten_tokens_gives_the_answers_it_gave(name, models):
    bundle = load_bundle(FOLDER / f"{name}.pt")
    if "repacked" not in ANSWERS[name]:
        with pytest.raises(BundleError, match="cannot be cut"):
            bundle.repack(10)
        return
    check_answers(bundle.repack(10), models, ANSWERS[name]["repacked"])


def test_a_bundle_written_again_is_read_as_the_same_one(name, models, tmp_path):
    before = load_bundle(FOLDER / f"{name}.pt")
    after = load_bundle(before.save(tmp_path / "again.pt").path)
    assert read_bundle(tmp_path / "again.pt").schema_version == schema.SCHEMA_VERSION
    drop = ("tensors",)
    assert {k: v for k, v in after.manifest.items() if k not in drop} == {
        k: v for k, v in before.manifest.items() if k not in drop
    }
    for key, tensor in version_4.tensors_of(before.content).items():
        assert torch.equal(tensor, version_4.tensors_of(after.content)[key])


def test_the_command_opens_it(name):
    shown = run_freres("inspect", FOLDER / f"{name}.pt", "--json")
    assert shown.status == 0, shown.err
    assert shown.json["visual_tokens"] == ANSWERS[name]["visual_tokens"]
    assert shown.json["tokens_by_kind"] == ANSWERS[name]["kinds"]
    assert run_freres("inspect", FOLDER / f"{name}.pt").status == 0


def test_what_version_1_lacks_has_its_default():
    manifest = read_bundle(FOLDER / "1-first.pt").manifest
    assert manifest["settings"]["deepstack"] == {"value": "keep", "source": "default"}
    assert manifest["geometry"]["fit"] is None and manifest["model"]["attention"] is None
    assert manifest["source"]["made_by_world"] is False


def test_the_files_hold_what_their_version_brought():
    tracks, adaptive = (read_bundle(FOLDER / f"3-{name}.pt").content for name in ("absorber", "adaptive"))
    assert tracks.gop_recipe.tolist() == [REFINED] * len(tracks.gop_recipe) and tracks.is_impulse.any()
    assert tracks.num_bands > 1 and not tracks.is_impulse.all(), "the recipe has a say where waves lie"
    assert not read_bundle(FOLDER / "2-absorber.pt").content.gop_recipe.any()
    assert isinstance(adaptive, Stretches) and len(adaptive.cut_frame) and len(adaptive.kind.unique()) == 2
    with_trends = read_bundle(FOLDER / "4-adaptive.pt").content
    assert not adaptive.has_trends and with_trends.trends.any() and len(with_trends.kind.unique()) == 2


@pytest.mark.parametrize("name", ["1-first", "1-absorber", "2-absorber", "2-uniform", "3-adaptive", "4-adaptive"])
def test_a_setting_that_is_added_later_has_its_default(name, monkeypatch):
    monkeypatch.setitem(KEYS, "shutter", Key(float, 0.5, "a setting of a later release"))
    settings = read_bundle(FOLDER / f"{name}.pt").manifest["settings"]
    assert settings["shutter"] == {"value": 0.5, "source": "default"}


@pytest.mark.parametrize("name", ["1-first", "2-absorber", "3-absorber"])
def test_ranges_are_those_of_the_version_and_not_of_today(name, monkeypatch):
    for key in ("temporal_share", "anchors"):
        monkeypatch.setitem(KEYS, key, replace(KEYS[key], low=0.9, high=0.91))
    assert isinstance(read_bundle(FOLDER / f"{name}.pt").content, Tracks)


def test_readers_know_every_setting_of_today():
    """A setting that is added goes to neither list: ``later_settings`` finds it. This fails when one is taken away."""
    today = set(KEYS) - {"description"}
    assert set(version_1.SETTINGS) - {"method", "reference_budget_tokens"} <= today
    for version in (version_2, version_3, version_4):
        assert set(later_settings(version.SETTINGS)) == today - set(version.SETTINGS)


def test_the_digest_of_the_rules_of_version_1():
    """They are frozen: whoever changes them makes bundles unreadable that were written long ago."""
    rules = encode_manifest(
        {key: vars(rule) | {"kind": rule.kind.__name__} for key, rule in version_1.SETTINGS.items()}
    )
    fields = repr(
        sorted((s, n, f.kind, f.may_be_null, f.length) for s, v in version_1.FIELDS.items() for n, f in v.items())
    )
    digest = hashlib.sha256((rules + fields + repr((version_1.TENSORS, version_1.DTYPES))).encode()).hexdigest()
    assert digest == "eef0c47d0b20951d5dd45ed71ee2aa017b153bc94a28fe605fddcc78d52f1388"


def test_a_future_version_is_refused_by_name(tmp_path):
    content = torch.load(FOLDER / "2-absorber.pt", weights_only=True) | {"schema_version": 99}
    torch.save(content, tmp_path / "later.pt")
    with pytest.raises(BundleError, match="expected version 1 or 2 or 3 or 4, got 99"):
        read_bundle(tmp_path / "later.pt")


def test_a_column_that_is_added_later_is_zero_in_earlier_bundles():
    tensors = read_bundle(FOLDER / "1-first.pt").content.tensors()
    added = {"gop_glow": Column("gop", "float32", shape=("8",)), "anchor_rank": Column("anchor", "int64")}
    added["static_halo"] = Column("static", LATENT, shape=("C",))
    complete = complete_columns(tensors, {**COLUMNS, **added})
    assert all(complete[name] is tensor for name, tensor in tensors.items())
    assert complete["gop_glow"].shape == (len(tensors["gop_start"]), 8)
    assert complete["anchor_rank"].dtype == torch.int64 and not complete["anchor_rank"].any()
    assert complete["static_halo"].shape == tensors["static_latents"].shape
