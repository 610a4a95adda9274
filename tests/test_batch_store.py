"""Bundles on stores: whole or not at all, under any name, and what happens where there is no room."""

from __future__ import annotations

import errno

import pytest

from freres_cli.workflows.batch_store import Store
from freres_cli.workflows.batch_worker import WorkerSetup
from tests.test_batch import clips as clips
from tests.test_batch import job_of, worker_of
from tests.test_batch import models as models
from tests.test_batch import store as store


def test_a_bundle_is_under_its_name_only_when_it_is_whole(store, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"whole")
    seen = []
    copy = type(store).cp_file

    def look(self, *arguments):
        seen.append({path: store.cat_file(path) for path in store.find("/out")})
        copy(self, *arguments)

    monkeypatch.setattr(type(store), "cp_file", look)
    Store("memory://out/x.pt").put(tmp_path / "file")
    assert seen == [{"/out/.x.pt.part": b"whole"}] and store.find("/out") == ["/out/x.pt"]


@pytest.mark.parametrize("name", ["clip [1].pt", "a*.pt", "q?.pt"])
def test_names_that_look_like_patterns_are_names_on_a_store(store, tmp_path, name):
    (tmp_path / "file").write_bytes(b"whole")
    store.pipe_file("/out/.clip 1.pt.part", b"another's")
    Store(f"memory://out/{name}").put(tmp_path / "file")
    assert store.cat_file(f"/out/{name}") == b"whole"
    assert sorted(store.find("/out")) == sorted(["/out/.clip 1.pt.part", f"/out/{name}"])


def test_a_full_store_ends_the_run(models, store, clips, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(store), "put_file", fail)
    worker = worker_of(WorkerSetup("memory://out", False, "bundled", "cpu"), models, tmp_path / "s")
    row = worker.run(job_of(clips / "clip0.mp4"))
    assert row.is_fatal and row.error.exit_status == 6
    assert row.error.message == "memory://out/clip0.pt: not enough disk space to write it" and "-o" in row.error.hint
    assert not store.find("/out")
