"""freres batch in one process: rows, resuming, stores, and what reaches the user."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fsspec
import pytest

from freres_cli.cli.compress import make_options
from freres_cli.workflows import batch as batch_workflow
from freres_cli.workflows import batch_ray
from freres_cli.workflows.batch_worker import FACTS, BatchRow, Job, VideoWorker, WorkerSetup
from tests.clips import write_short_clips
from tests.runner import check_failure, fails, run_freres

FLAGS = ("--budget", 40, "--device", "cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_short_clips(tmp_path_factory.mktemp("batch"), 2)


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    """The bundle of the first clip as ``freres compress`` makes it."""
    path = tmp_path_factory.mktemp("alone") / "alone.pt"
    assert run_freres("compress", clips / "clip0.mp4", *FLAGS, "-o", path).status == 0
    return path.read_bytes()


@pytest.fixture(scope="module")
def models():
    """Workers of this module share one tower."""
    worker = VideoWorker(WorkerSetup("", False, "bundled", "cpu"), Path())
    return worker._open_models()


@pytest.fixture
def run_here(monkeypatch, models, tmp_path):
    """Stands in for the engine: the same worker, in this process. Returns the statuses of the last run."""

    def engine(jobs, setup, num_actors):
        worker = worker_of(setup, models, tmp_path / "scratch")
        yield from enumerate(map(worker.run, jobs))

    monkeypatch.setattr(batch_workflow, "run_local", engine)


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def worker_of(setup, models, scratch):
    scratch.mkdir(exist_ok=True)
    worker = VideoWorker(setup, scratch)
    worker._models = models
    return worker


def job_of(video, name="clip0", **changes):
    return Job(str(video), name, make_options({"budget_tokens": 40, **changes}, None, None, None, device="cpu"))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_bundles_and_a_second_run(run_here, clips, alone, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    arguments = ("batch", tmp_path / "bad.mp4", clips, "-o", tmp_path / "out", *FLAGS)
    run = run_freres(*arguments)
    assert run.status == 3 and "1 of 3 videos failed" in run.errors[0]
    assert run.out.split() == [str(tmp_path / "out" / f"clip{i}.pt") for i in range(2)]
    assert (tmp_path / "out" / "clip0.pt").read_bytes() == alone
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert len({tuple(row) for row in rows}) == 1  # every row has every key
    assert rows[0]["exit_status"] == 3 and "bad.mp4" in rows[0]["error"] and rows[0]["visual_tokens"] is None
    assert rows[1]["visual_tokens"] == 40 and rows[1]["total_s"] > 0 and rows[1]["error"] is None
    assert rows[1]["bundle_bytes"] == len(alone) and rows[1]["video_bytes"] == (clips / "clip0.mp4").stat().st_size
    again = run_freres(*arguments, "--json")
    assert [json.loads(line)["status"] for line in again.out.splitlines()] == ["failed", "skipped", "skipped"]
    assert [json.loads(line) for line in again.out.splitlines()] == rows_of(tmp_path / "out")


def test_a_bundle_made_otherwise_is_a_failed_row_unless_forced(run_here, clips, tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"video": str(clips / "clip0.mp4"), "budget_tokens": 30}) + "\n")
    assert run_freres("batch", clips / "clip0.mp4", "-o", tmp_path / "out", *FLAGS).status == 0
    before = (tmp_path / "out" / "clip0.pt").read_bytes()
    run = run_freres("batch", listed, "-o", tmp_path / "out", *FLAGS)
    assert run.status == 2 and "differs in budget_tokens" in run.errors[0]
    assert (tmp_path / "out" / "clip0.pt").read_bytes() == before
    assert run_freres("batch", listed, "-o", tmp_path / "out", *FLAGS, "--force").status == 0
    assert rows_of(tmp_path / "out")[0]["visual_tokens"] == 30


@pytest.mark.parametrize("taken", ["in/clip0.mp4", "linked.mp4", "out/clip0.pt", "same/clip0.pt"])
def test_rows_never_replace_a_video_or_a_bundle(clips, tmp_path, taken):
    (tmp_path / "same").symlink_to(tmp_path / "out")
    (tmp_path / "in").mkdir()
    video = shutil.copy(clips / "clip0.mp4", tmp_path / "in")
    (tmp_path / "linked.mp4").symlink_to(video)
    before = Path(video).read_bytes()
    run = run_freres("batch", video, "-o", tmp_path / "out", "--rows", tmp_path / taken, "--force", *FLAGS)
    assert run.status == 2 and "would be replaced" in run.errors[0]
    assert Path(video).read_bytes() == before


def test_a_missing_model_ends_the_run_in_one_line(clips, tmp_path):
    setup = WorkerSetup(str(tmp_path / "out"), False, str(tmp_path), "cpu")
    row = VideoWorker(setup, tmp_path).run(job_of(clips / "clip0.mp4"))
    assert row.is_fatal and row.error.exit_status == 5 and "config.json" in row.error.message
    bad = replace(setup, model="bundled", device="cuda:99")
    row = VideoWorker(bad, tmp_path).run(job_of(clips / "clip0.mp4"))
    assert row.is_fatal and row.error.exit_status == 6


def test_a_bug_that_one_video_shows_is_a_failed_row(models, clips, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("freres_cli.workflows.batch_worker.compress_many", fail)
    worker = worker_of(WorkerSetup(str(tmp_path / "out"), False, "bundled", "cpu"), models, tmp_path / "s")
    row = worker.run(job_of(clips / "clip0.mp4"))
    assert row.status == "failed" and not row.is_fatal
    assert row.error.exit_status == 1 and "unexpected ZeroDivisionError: inside" in row.error.message


def test_on_a_store_the_bundle_is_the_one_that_files_give_and_is_skipped_the_second_time(
    models, store, clips, alone, tmp_path
):
    store.put_file(str(clips / "clip0.mp4"), "/in/clip0.mp4")
    worker = worker_of(WorkerSetup("memory://out", False, "bundled", "cpu"), models, tmp_path / "s")
    row = worker.run(job_of("memory://in/clip0.mp4", "deep/clip0"))
    assert row.status == "done" and row.bundle == "memory://out/deep/clip0.pt", row.error
    assert {"fetch", "store", "encode"} <= set(row.timings_s)
    assert store.find("/out") == ["/out/deep/clip0.pt"] and store.cat_file("/out/deep/clip0.pt") == alone
    before = store.info("/out/deep/clip0.pt")
    again = worker.run(job_of("memory://in/clip0.mp4", "deep/clip0"))
    assert again.status == "skipped" and again.facts["bundle_bytes"] == len(alone)
    assert store.info("/out/deep/clip0.pt") == before
    assert list((tmp_path / "s").iterdir()) == []  # no copy stays


def test_a_full_disk_ends_a_batch_but_one_full_of_copies_is_a_failed_row(
    run_here, models, store, clips, tmp_path, monkeypatch
):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("freres_cli.bundle.store.torch.save", fill)
    run = run_freres("batch", clips, "-o", tmp_path / "out", *FLAGS, "-q")
    check_failure(run, 6, "clip0.pt: not enough disk space")
    assert "failed:" not in run.err and not (tmp_path / "out").exists()
    row = worker_of(WorkerSetup("memory://out", False, "bundled"), models, tmp_path).run(job_of(clips / "clip0.mp4"))
    assert (row.status, row.is_fatal, row.error.exit_status) == ("failed", False, 6)
    assert "TMPDIR" in row.error.hint and str(tmp_path / "bundles") not in row.error.message


def test_on_a_store_what_differs_or_is_damaged_is_not_replaced_unless_forced(models, store, clips, alone, tmp_path):
    setup = WorkerSetup("memory://out", False, "bundled", "cpu")
    worker = worker_of(setup, models, tmp_path / "s")
    store.pipe_file("/out/clip0.pt", alone[:-100])
    row = worker.run(job_of(clips / "clip0.mp4"))
    assert row.status == "failed" and row.error.message.startswith("memory://out/clip0.pt: already exists, and is not")
    assert store.cat_file("/out/clip0.pt") == alone[:-100]
    forced = worker_of(replace(setup, force=True), models, tmp_path / "s")
    assert forced.run(job_of(clips / "clip0.mp4")).status == "done" and store.cat_file("/out/clip0.pt") == alone


@pytest.mark.parametrize("step", ["put_file", "mv"])
def test_a_bundle_that_cannot_be_stored_leaves_nothing(models, store, clips, tmp_path, monkeypatch, step):
    def fail(*_, **__):
        raise PermissionError("no rights")

    monkeypatch.setattr(type(store), step, fail)
    worker = worker_of(WorkerSetup("memory://out", False, "bundled", "cpu"), models, tmp_path / "s")
    row = worker.run(job_of(clips / "clip0.mp4"))
    assert (
        row.status == "failed" and not row.is_fatal and "memory://out/clip0.pt: cannot be written" in row.error.message
    )
    assert store.find("/out") == []


def test_a_video_that_is_not_on_the_store_is_a_failed_row(models, store, tmp_path):
    worker = worker_of(WorkerSetup(str(tmp_path / "out"), False, "bundled", "cpu"), models, tmp_path / "s")
    row = worker.run(job_of("memory://in/gone.mp4"))
    assert row.status == "failed" and not row.is_fatal and row.error.exit_status == 3
    store.pipe_file("/in/bad.mp4", bytes(range(64)))
    row = worker.run(job_of("memory://in/bad.mp4"))
    assert row.error.message.startswith("memory://in/bad.mp4: not a video")


def test_rows_may_go_to_a_store_and_replace_only_rows(run_here, store, clips, tmp_path):
    arguments = ("batch", clips / "clip0.mp4", "-o", "memory://out", *FLAGS, "--rows")
    assert run_freres(*arguments, "memory://out/shard-1.jsonl").status == 0
    assert json.loads(store.cat_file("/out/shard-1.jsonl"))["status"] == "done"
    run = run_freres(*arguments, tmp_path / "1.jsonl")
    assert run.status == 0 and run.out == "memory://out/clip0.pt\n"
    for place, path in (("memory://out/mine", None), (tmp_path / "mine", tmp_path / "mine")):
        store.pipe_file("/out/mine", b"mine\n") if path is None else path.write_text("mine\n")
        check_failure(run_freres(*arguments, place), 2, "holds no rows of a batch")
    assert (tmp_path / "mine").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--engine", "spark"), "--engine: expected one of local, ray"),
        (("--address", "auto"), "--address: engine local has none"),
        (("--actors", "0"), "--actors"),
        (("--method", "other"), "--method"),
        (("-o", ""), "-o"),
        (("-o", "nosuch://out"), "nosuch://out"),
        (("--rows", "no/such/folder/rows.jsonl"), "folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(clips, tmp_path, monkeypatch, arguments, text):
    monkeypatch.setattr(batch_workflow, "run_local", None)
    output = () if "-o" in arguments else ("-o", tmp_path / "out")
    run = run_freres("batch", clips, *output, *FLAGS, *arguments)
    assert run.status == 2 and text in run.err and run.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_ray_its_engine_is_refused_by_name(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    run = run_freres("batch", clips, "-o", tmp_path / "out", *FLAGS, "--engine", "ray")
    check_failure(run, 2, "Ray is not installed")
    assert list(tmp_path.iterdir()) == []
    assert "freres[ray]" in run.err


def test_ray_gets_places_that_do_not_depend_on_the_working_folder(clips, tmp_path, monkeypatch):
    seen = []

    def engine(jobs, setup, num_actors, address):
        seen.append((setup.output, setup.model, jobs[0].video))
        yield 0, BatchRow(jobs[0].video, "clip0.pt", "skipped", dict.fromkeys(FACTS, 1))

    monkeypatch.setattr(batch_workflow, "run_on_ray", engine)
    monkeypatch.chdir(tmp_path)
    shutil.copy(clips / "clip0.mp4", tmp_path)
    (tmp_path / "model").mkdir()
    run = run_freres("batch", "clip0.mp4", "-o", "out", "--engine", "ray", "--model", "model")
    assert run.status == 0 and seen == [tuple(str(tmp_path / name) for name in ("out", "model", "clip0.mp4"))], run.err


@pytest.mark.parametrize(
    ("cluster", "device", "actors", "expected"),
    [
        ({"CPU": 8.0}, None, None, (1, 0.0)),
        ({"CPU": 8.0, "GPU": 4.0}, None, None, (4, 1.0)),
        ({"CPU": 8.0, "GPU": 4.0}, None, 8, (8, 0.5)),
        ({"CPU": 8.0, "GPU": 4.0}, "cpu", 8, (8, 0.0)),
        ({"CPU": 8.0, "GPU": 4.0}, None, 2, (2, 1.0)),
        ({"CPU": 8.0, "GPU": 4.0}, None, 6, (6, 0.5)),  # not 0.67: a share below 1 is of one GPU
        ({"CPU": 8.0, "GPU": 1.0}, None, 6, (6, 0.1666)),  # Ray rounds 1/6 up, and six of those are more than one
    ],
)
def test_actors_share_the_gpus_of_a_cluster(cluster, device, actors, expected):
    setup = WorkerSetup("out", False, "bundled", device)
    ray = SimpleNamespace(cluster_resources=lambda: cluster)
    assert batch_ray._share_gpus(ray, setup, actors, 100) == expected
    with fails(6, "at most one actor a CPU"):
        batch_ray._share_gpus(ray, setup, 9, 100)


class StandInRay(ModuleType):
    """What Ray 2.60 does first: an address that is not given comes from RAY_ADDRESS, and a cluster that runs already has its
    own CPUs."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.data = ModuleType("ray.data")
        context = SimpleNamespace()
        vars(self.data).update(DataContext=SimpleNamespace(get_current=lambda: context))
        self.joined: list[str | None] = []

    def init(self, address: str | None = None, num_cpus: int | None = None, **_: object) -> None:
        if address in (None, "auto"):
            address = os.environ.get("RAY_ADDRESS") or address
        if address not in (None, "local") and num_cpus is not None:
            raise ValueError("When connecting to an existing cluster, num_cpus must not be provided.")
        self.joined.append(address)


@pytest.fixture
def ray(monkeypatch):
    module = StandInRay()
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setitem(sys.modules, "ray.data", module.data)
    return module


def test_without_an_address_a_cluster_is_started_here_whatever_else_runs(ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    batch_ray._start_ray(None, 2)
    batch_ray._start_ray("auto", 2)
    assert ray.joined == ["local", "10.0.0.1:6379"]


def test_a_cluster_that_does_not_start_is_told_by_what_was_asked_for(ray, monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError("no\n  room")

    monkeypatch.setattr(ray, "init", fail)
    for address, told in (
        (None, "--engine ray: Ray cannot be started: no room"),
        ("auto", "--address auto: Ray cannot"),
    ):
        with fails(2, told):
            batch_ray._start_ray(address, 2)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_answers_is_refused(address):
    with fails(2, f"--address {address}: Ray cannot be reached"):
        batch_ray._check_address(address)


def test_a_copy_of_a_video_elsewhere_is_the_same_video(run_here, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "moved")
    for folder, status in ((clips, "done"), (tmp_path / "moved", "skipped")):
        assert run_freres("batch", folder, "-o", tmp_path / "out", *FLAGS).status == 0
        assert {row["status"] for row in rows_of(tmp_path / "out")} == {status}


@pytest.mark.parametrize("force", [False, True])
def test_a_store_that_does_not_say_what_it_holds_is_not_written_to_unless_forced(
    models, store, clips, tmp_path, monkeypatch, force
):
    def refuse(*_, **__):
        raise PermissionError("403")

    worker = worker_of(WorkerSetup("memory://out", force, "bundled", "cpu"), models, tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "info", refuse)
        row = worker.run(job_of(clips / "clip0.mp4"))
    assert row.status == ("done" if force else "failed"), row.error
    assert store.find("/out") == (["/out/clip0.pt"] if force else [])
    assert force or "memory://out/clip0.pt: whether it exists cannot be read: PermissionError: 403" in row.error.message


def test_the_rows_do_not_replace_a_list(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"video": "x.mp4"}\n')
    run = run_freres("batch", "rows.jsonl", "-o", ".", "--force")
    check_failure(run, 2, "rows.jsonl: is one of the lists")
    check_failure(run_freres("batch", "*.jsonl", "-o", ".", "--force"), 2, "rows.jsonl: is one of the lists")
    Path("OWN.JSONL").write_bytes(Path("rows.jsonl").read_bytes())  # read as a list, so kept as one
    run = run_freres("batch", "OWN.JSONL", "-o", ".", "--rows", "OWN.JSONL", "--force")
    check_failure(run, 2, "OWN.JSONL: is one of the lists")
    assert (tmp_path / "rows.jsonl").read_text() == '{"video": "x.mp4"}\n'


@pytest.mark.parametrize(("device", "expected"), [(None, 4), ("cuda", 4), ("cuda:1", 1), ("cpu", 1)])
def test_a_worker_a_gpu_unless_one_gpu_is_named(clips, tmp_path, monkeypatch, device, expected):
    started = []
    monkeypatch.setattr(batch_workflow.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(batch_workflow, "run_local", lambda jobs, setup, count: started.append(count) or iter(()))
    setup = WorkerSetup(str(tmp_path), False, "bundled", device)
    batch_workflow._start(batch_workflow.BatchRequest([None] * 9, setup, "local", None, None, ""))
    assert started == [expected]
