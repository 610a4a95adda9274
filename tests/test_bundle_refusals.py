"""Damaged, foreign and unsafe bundles are refused, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from freres_cli.bundle.schema import encode_manifest
from freres_cli.bundle.store import read_bundle
from freres_cli.errors import BundleError, ExitStatus
from freres_cli.method.residuals import MAX_TIME_BINS
from freres_cli.presets import KEYS
from freres_cli.tracks import MOST_WAVES
from tests.forged_bundles import (
    MANIFEST,
    edit_manifest,
    edit_text,
    forge,
    make_tracks,
    manifest_for,
    rewrite,
    smooth_latents,
)
from tests.forged_bundles import bundle as bundle
from tests.forged_bundles import tracks as tracks
from tests.runner import check_failure, run_freres


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_pickle_inside_is_refused_and_not_run(bundle, tmp_path):
    went_off = tmp_path / "bomb-went-off"
    content = torch.load(bundle, weights_only=True)
    torch.save({**content, "extra": Bomb(went_off)}, bundle)
    with pytest.raises(BundleError, match="pickled object"):
        read_bundle(bundle)
    assert not went_off.exists()
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Bomb(went_off)))
    with pytest.raises(BundleError, match="not a freres bundle"):
        read_bundle(plain)
    assert not went_off.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "what?", "--device", "cpu"),
        ("inspect",),
        ("report",),
        ("repack", "--budget", 9, "-o", "out.pt"),
        ("export", "--to", "safetensors", "-o", "out"),
    ],
)
def test_a_bundle_that_may_not_be_read_is_refused_as_a_bundle(bundle, tmp_path, monkeypatch, arguments):
    def refuse(path, *rest, **more):  # root may read every file
        if path == bundle:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **more)

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.R_OK)
    monkeypatch.chdir(tmp_path)
    verb, *others = arguments
    run = run_freres(verb, bundle, *others)
    check_failure(run, ExitStatus.BUNDLE, f"{bundle}: cannot be read: Permission denied")


def test_every_flipped_byte_is_found(bundle):
    whole = bytearray(bundle.read_bytes())
    step = len(whole) // 60
    original = {name: t.clone() for name, t in read_bundle(bundle).tracks.tensors().items()}
    for at in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[at] ^= 0x41
        bundle.write_bytes(flipped)
        try:
            back = read_bundle(bundle)
        except BundleError:
            continue
        # What is not covered is zip padding: the content is still right.
        assert all(torch.equal(getattr(back.tracks, name), t) for name, t in original.items()), at


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_bundle_is_refused(bundle, keep):
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(BundleError):
        read_bundle(bundle)


def test_missing_files_folders_and_strangers_are_refused(tmp_path):
    with pytest.raises(BundleError, match="no such file"):
        read_bundle(tmp_path / "none.pt")
    with pytest.raises(BundleError, match="is a folder"):
        read_bundle(tmp_path)
    torch.save({"weights": torch.zeros(300)}, tmp_path / "model.pt")
    for missing in (1, 1000):
        (tmp_path / "cut.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:-missing])
        with pytest.raises(BundleError, match="damaged bundle: its end is missing"):
            read_bundle(tmp_path / "cut.pt")
    with pytest.raises(BundleError, match="not a freres bundle"):
        read_bundle(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(BundleError):
        read_bundle(tmp_path / "zip.pt")


@pytest.mark.parametrize("version", [0, 5, "1", "4", True, None])
def test_another_schema_version_is_refused_by_name(bundle, version):
    rewrite(bundle, schema_version=version)
    with pytest.raises(BundleError, match="schema: expected version 1 or 2 or 3 or 4, got"):
        read_bundle(bundle)


def test_a_changed_manifest_or_tensor_is_refused(bundle, tracks):
    content = torch.load(bundle, weights_only=True)
    manifest = json.loads(content["manifest"])
    rewrite(bundle, manifest=encode_manifest({**manifest, "model": {"model_id": "y"}}))
    with pytest.raises(BundleError, match="manifest's checksum"):
        read_bundle(bundle)
    tensors = dict(content["tensors"])
    tensors["anchor_latents"] = tensors["anchor_latents"] + 1e-6
    rewrite(bundle, manifest=content["manifest"], tensors=tensors)
    with pytest.raises(BundleError, match="anchor_latents: the checksum"):
        read_bundle(bundle)
    tensors["anchor_latents"] = content["tensors"]["anchor_latents"][:-1]
    rewrite(bundle, tensors=tensors)
    with pytest.raises(BundleError, match=r"anchor_latents: expected float32 \["):
        read_bundle(bundle)
    del tensors["anchor_latents"]
    rewrite(bundle, tensors=tensors)
    with pytest.raises(BundleError, match="differ: anchor_latents"):
        read_bundle(bundle)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("anchor_cell", 64),
        ("anchor_gop", 99),
        ("coefficient_cell", -1),
        ("static_gop", 1 << 40),
        ("summary_gop", -5),
        ("gop_anchor_frame", -1),
        ("gop_num_residuals", 1 << 40),
        ("gop_num_bins", 99),
        ("gop_bin_frames", 0),
        ("gop_start", 3),
        ("coefficient_band", 77),
        ("coefficient_band", (1 << 15) + 77),
        ("base_cell", 15),
    ],
)
def test_an_index_out_of_range_is_refused_even_with_right_checksums(tmp_path, tracks, name, value, version):
    tensors = {key: tensor.clone() for key, tensor in tracks.tensors().items()}
    tensors[name][0] = value
    forge(tmp_path / "b.pt", tracks, tensors, version)
    with pytest.raises(
        BundleError, match="gop_num_bins: expected" if name == "gop_bin_frames" else f"{name}: expected"
    ):
        read_bundle(tmp_path / "b.pt")


def test_a_band_that_no_method_makes_is_refused(tmp_path):
    """Energies take memory for each band up to the highest: 108 GB of a file of 47 KB."""
    long = make_tracks(smooth_latents(300), 60, 1)
    bins = long.gop_num_residuals.clone()
    band = long.coefficient_band.clone()
    wave = int((~long.is_impulse).nonzero()[0])
    for value, is_refused in ((MOST_WAVES - 1, False), (MOST_WAVES, True), (int(bins[0]) - 1, True)):
        band[wave] = value
        changed = {"gop_num_bins": bins, "gop_bin_frames": torch.ones_like(bins), "coefficient_band": band}
        forge(tmp_path / f"{value}.pt", long, {**long.tensors(), **changed})
        if is_refused:
            with pytest.raises(BundleError, match=r"coefficient_band: expected 0\.\.127, or an impulse"):
                read_bundle(tmp_path / f"{value}.pt")
        else:
            read_bundle(tmp_path / f"{value}.pt")
    assert KEYS["max_coefficients"].high <= MOST_WAVES == MAX_TIME_BINS


def test_an_expanded_view_that_claims_more_than_the_file_holds_is_refused(bundle):
    content = torch.load(bundle, weights_only=True)
    tensors = {**content["tensors"], "anchor_latents": torch.zeros(1).expand(1 << 40)}
    torch.save({**content, "tensors": tensors}, bundle)
    with pytest.raises(BundleError):
        read_bundle(bundle)


def test_forged_columns_are_refused_whatever_their_shape_or_type(tmp_path, tracks):
    for number, name in enumerate(tracks.tensors()):
        tensor = getattr(tracks, name)
        kind = torch.int64 if tensor.is_floating_point() else torch.float32
        for trick, forged in enumerate((tensor[..., None].expand(*tensor.shape, 2), tensor.to(kind), tensor[:0])):
            if forged.shape == tensor.shape and forged.dtype == tensor.dtype:
                continue
            path = tmp_path / f"{number}-{trick}.pt"
            forge(path, tracks, {**tracks.tensors(), name: forged.contiguous()})
            with pytest.raises(BundleError):
                read_bundle(path)


def test_a_coefficient_given_twice_is_refused(tmp_path, tracks):
    tensors = dict(tracks.tensors())
    for name in ("coefficient_gop", "coefficient_cell", "coefficient_band"):
        tensors[name] = tensors[name].clone()
        tensors[name][1] = tensors[name][0]
    forge(tmp_path / "b.pt", tracks, tensors)
    with pytest.raises(BundleError, match="each coefficient once"):
        read_bundle(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("key", "value"), [("variant", "idct"), ("variant", "magic"), ("anchors", "many"), ("text_after", 3)]
)
def test_forged_settings_are_refused(tmp_path, tracks, key, value):
    settings = {**MANIFEST["settings"], key: {"value": value, "source": "flag"}}
    forge(tmp_path / "b.pt", tracks, tracks.tensors(), settings=settings)
    with pytest.raises(BundleError, match="damaged bundle"):
        read_bundle(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "changes",
    [
        None,
        {"full_tokens": "many"},
        {"full_tokens": 0},
        {"visual_tokens": 0},
        {"visual_tokens": 299},
        {"tokens_by_kind": {"anchor": 300, "dynamic": 0, "static": 0, "summary": 0}},
    ],
)
def test_forged_counts_are_refused(tmp_path, tracks, changes):
    tokens = {} if changes is None else {**manifest_for(tracks)["tokens"], **changes}
    forge(tmp_path / "b.pt", tracks, tracks.tensors(), tokens=tokens)
    with pytest.raises(BundleError, match="damaged bundle"):
        read_bundle(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("geometry", "grid", [2**62, 2**62, 2**62]),
        ("geometry", "pooled_grid", [2048, 2048]),
        ("geometry", "pooled_grid", [0, 1]),
        ("model", "num_deep_layers", 10**9),
        ("model", "num_deep_layers", -3),
        ("model", "num_deep_layers", 2),
        ("model", "width", 7),
        ("tokens", "full_tokens", 7),
        ("tokens", "full_tokens", 2**60),
        ("source", "bytes", -1),
    ],
)
def test_facts_that_cannot_be_are_refused(bundle, section, key, value):
    edit_manifest(bundle, lambda manifest: manifest[section].update({key: value}))
    with pytest.raises(BundleError, match="damaged bundle"):
        read_bundle(bundle)


@pytest.mark.parametrize("value", ['"\\ud800"', "1e400", "-1e400", "NaN", "Infinity"])
def test_what_json_does_not_hold_is_refused(bundle, value):
    edit_text(bundle, '"source":{', f'"source":{{"more":{value},')
    with pytest.raises(BundleError, match="not JSON"):
        read_bundle(bundle)


@pytest.mark.parametrize("depth", [40, 900])
def test_a_manifest_nested_deeply_is_refused(bundle, depth):
    def nest(manifest):
        nested = []
        for _ in range(depth):
            nested = [nested]
        manifest["more"] = nested

    edit_manifest(bundle, nest)
    with pytest.raises(BundleError, match="not JSON"):
        read_bundle(bundle)


@pytest.mark.parametrize("history", [[{"verb": 3}], [{}], ["compress"]])
def test_a_history_that_is_none_is_refused(bundle, history):
    edit_manifest(bundle, lambda manifest: manifest.update(history=history))
    with pytest.raises(BundleError, match="damaged bundle"):
        read_bundle(bundle)


def test_a_method_makes_its_own_kind_of_content(bundle):
    method = {"value": "uniform", "source": "flag"}
    edit_manifest(bundle, lambda manifest: manifest["settings"].update(method=method))
    with pytest.raises(BundleError, match="method uniform does not make tracks"):
        read_bundle(bundle)


@pytest.mark.parametrize("disguise", [lambda t: t.to("meta"), torch._neg_view, lambda t: t.requires_grad_()])
def test_tensors_that_are_no_plain_numbers_are_refused(bundle, disguise):
    content = torch.load(bundle, weights_only=True)
    content["tensors"]["frame_seconds"] = disguise(content["tensors"]["frame_seconds"].clone())
    torch.save(content, bundle)
    with pytest.raises(BundleError):
        read_bundle(bundle)
