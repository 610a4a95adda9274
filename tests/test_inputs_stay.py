"""No verb replaces a file that it reads, by whatever name, with or without --force."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from freres_cli.errors import ExitStatus
from freres_cli.files import InputFiles
from freres_cli.presets import presets_dir
from freres_cli.world.bundled_model import bundled_adapter
from tests.benchmark_copies import MAKERS
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.pipeline_fixtures import tiny as tiny
from tests.runner import check_failure, fails, run_freres

ROW = {"id": "1", "video": "v.mp4", "category": "x", "question": "what?", "choices": ["a", "b"], "answer": "a"}
EVAL = ("eval", "q.jsonl", "--methods", "fre-res", "--budgets", "0.1")
RUNS = {
    "eval -o adapter": (*EVAL, "--adapter", "ad.safetensors", "-o", "ad.safetensors"),
    "eval -o video": (*EVAL, "-o", "v.mp4"),
    "eval -o preset": (*EVAL, "--preset", "p.yaml", "-o", "p.yaml"),
    "eval --csv video": (*EVAL, "--csv", "v.mp4"),
    "eval --csv adapter": (*EVAL, "--adapter", "ad.safetensors", "--csv", "ad.safetensors"),
    "eval --csv model": (*EVAL, "--model", "model", "--csv", "model/config.json"),
    "eval --plot video": (*EVAL, "--plot", "v.png"),
    "eval --csv annotations": ("eval", "copy", *EVAL[2:], "--csv", "copy/test.csv"),
    "eval --csv its map": ("eval", "copy", *EVAL[2:], "--csv", "copy/map_vid_vidorID.json"),
    "train": ("train", "q.jsonl", "-o", "q.jsonl"),
    "train over a video": ("train", "q.jsonl", "-o", "v.mp4"),
    "train, its state": ("train", "q.state", "-o", "q"),
    "report": ("report", "b.pt", "-o", "ad.safetensors", "--adapter", "ad.safetensors"),
    "export": ("export", "b.pt", "--to", "safetensors", "-o", "ad.safetensors", "--adapter", "ad.safetensors"),
    "export over the model": ("export", "b.pt", "--to", "hf", "--model", "model", "-o", "model/config.json"),
    "compress": ("compress", "v.mp4", "-o", "p.yaml", "--preset", "p.yaml"),
    "compress over the model": ("compress", "v.mp4", "--model", "model", "-o", "model/model.safetensors"),
    "compress -": ("compress", "-", "-o", "p.yaml", "--preset", "p.yaml"),
    "batch": ("batch", "v.mp4", "-o", "out", "--rows", "p.yaml", "--preset", "p.yaml"),
    "fidelity": ("fidelity", "v.png", "--plot", "v.png"),
    "profile": ("profile", "v.png", "--plot", "v.png"),
    "ablate": ("ablate", "q.png", "-o", "out", "--plot", "q.png"),
}


@pytest.fixture(scope="module")
def files(clip, bundle, tiny, tmp_path_factory):
    """A file of every kind that verbs read, and the folder of a model."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("v.mp4", "v.png"):
        shutil.copy(clip, folder / name)
    for name in ("q.jsonl", "q.png", "q.state"):
        (folder / name).write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": "2", "video": "v.png"}))
    shutil.copy(bundle, folder / "b.pt")
    shutil.copy(bundled_adapter(), folder / "ad.safetensors")
    shutil.copy(presets_dir() / "bundled.yaml", folder / "p.yaml")
    shutil.copytree(tiny[0], folder / "model")
    (folder / "copy").mkdir()
    MAKERS["nextqa"](folder / "copy")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_verb_does_not_replace_what_it_reads(files, name, monkeypatch):
    monkeypatch.chdir(files)
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    run = run_freres(*RUNS[name], "--force", stdin=b"a video")
    check_failure(run, 2, "itself")
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["same", "link", "hard link", "dots"])
def test_an_input_is_known_by_any_name(tmp_path, kind):
    read = tmp_path / "read"
    read.mkdir()
    (read / "a.pt").write_bytes(b"a")
    output = {"dots": read / ".." / "read" / "a.pt"}.get(kind, read / "a.pt")
    if "link" in kind:
        output = tmp_path / "b.pt"
        (os.symlink if kind == "link" else os.link)(read / "a.pt", output)
    inputs = InputFiles([("bundle", read / "a.pt"), ("adapter", None)])
    with fails(ExitStatus.USAGE, "is the bundle itself") as caught:
        inputs.refuse(output, "--csv")
    assert "--csv" in caught.value.hint
    (tmp_path / "copy.pt").write_bytes(b"a")
    for other in (tmp_path / "copy.pt", tmp_path / "new.pt", tmp_path / ("n" * 300), None):
        inputs.refuse(other)


def test_of_many_videos_none_is_replaced_by_the_bundle_of_another(files, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(files / "v.mp4", tmp_path / name)
    (tmp_path / "out" / "a.pt").symlink_to(tmp_path / "b.mp4")  # what is written to a link goes where it leads
    flags = ("-o", tmp_path / "out", "--force", "--frames", 4, "--budget", 10)
    run = run_freres("compress", tmp_path / "a.mp4", tmp_path / "b.mp4", *flags)
    assert run.status == 2 and "a.pt: is the video itself" in run.err
    assert (tmp_path / "b.mp4").read_bytes() == (files / "v.mp4").read_bytes()
