"""Memory that ran out: one line and status 6, and what goes on afterwards has that memory back."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from freres_cli.backbones import batches
from freres_cli.bundle import store
from freres_cli.cli import app as cli_app
from freres_cli.devices import memory_errors_as
from freres_cli.errors import BackboneError, ResourceError, as_freres_error
from freres_cli.pipeline import session as session_module
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import make_source
from freres_cli.pipeline.query import Query
from freres_cli.workflows.compare import compare
from freres_cli.workflows.compress import compress_many
from freres_cli.workflows.fidelity import measure_fidelity
from tests.evaluations import run_eval, write_clips, write_questions
from tests.loaded_models import Wrapped, loaded_models, models_with
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, fails, run_freres
from tests.test_cli_compare import request_for as compare_request
from tests.test_cli_fidelity import request_for as fidelity_request

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("HIP"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]
each_failure = pytest.mark.parametrize("failure", OUT_OF_MEMORY, ids=range(len(OUT_OF_MEMORY)))


@each_failure
def test_a_bundle_that_does_not_fit_in_memory_is_not_called_damaged(bundle, monkeypatch, failure):
    def fail(path):
        raise failure

    monkeypatch.setattr(store, "_load", fail)
    with fails(6, f"{bundle}: not enough memory to read it"):
        store.read_bundle(bundle)


class Full(Wrapped):
    """Half of a model that runs out of memory in its first call. ``held``: at each later one, whether what the first call
    had is still there."""

    def __init__(self, inner):
        super().__init__(inner)
        self.first, self.held = None, []

    def _fill(self):
        if self.first is not None:
            self.held.append(self.first() is not None)
            return
        activations = torch.zeros(8)
        self.first = weakref.ref(activations)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def encode(self, pixels):
        self._fill()
        return self.inner.encode(pixels)

    def splice(self, *args):
        self._fill()
        return self.inner.splice(*args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("full"))


@pytest.fixture
def no_collector():
    """Memory is free at once, not when the collector of cycles comes by."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def eval_videos(folder, out):
    half = Full(loaded_models().encoder)
    run_eval(write_questions(folder), "uniform", "0.5", models=models_with(encoder=half))
    return half


def eval_cells(folder, out):
    half = Full(loaded_models().language_model)
    run_eval(write_questions(folder), "uniform,evs", "0.5", limit=1, models=models_with(language_model=half))
    return half


def compare_cells(folder, out):
    half = Full(loaded_models().language_model)
    request = compare_request(folder / "clip0.mp4", "uniform,evs", queries=(Query("What moves?"),))
    compare(request, models_with(language_model=half))
    return half


def fidelity_videos(folder, out):
    half = Full(loaded_models().encoder)
    request = fidelity_request(folder / "clip0.mp4", folder / "clip1.mp4", methods="uniform", budgets="0.5")
    measure_fidelity(request, models=models_with(encoder=half))
    return half


def compress_videos(folder, out):
    half = Full(loaded_models().encoder)
    compressor = Compressor(models=models_with(encoder=half), budget_tokens=40)
    videos = [(folder / f"clip{i}.mp4", out / f"clip{i}") for i in range(2)]
    rows = compress_many(compressor, videos, out)
    assert [row.status for row in rows] == ["failed", "done"]
    return half


@pytest.mark.parametrize("work", [eval_videos, eval_cells, compare_cells, fidelity_videos, compress_videos])
def test_the_next_one_of_many_has_the_memory_back(folder, tmp_path, no_collector, work):
    half = work(folder, tmp_path)
    assert half.held and not any(half.held)


def test_an_error_that_is_kept_says_the_same_and_holds_no_frame():
    with pytest.raises(BackboneError) as caught:
        raise BackboneError("a thing", "a hint") from ValueError()
    kept = as_freres_error(caught.value, "clip.mp4")
    assert type(kept) is BackboneError and (kept.message, kept.hint) == ("a thing", "a hint")
    assert kept.__traceback__ is kept.__cause__ is kept.__context__ is None


@each_failure
def test_every_way_to_say_so_is_one_line_and_status_6(monkeypatch, failure):
    def fail():
        raise failure

    monkeypatch.setattr(cli_app, "app", fail)
    check_failure(run_freres("doctor"), 6, "not enough memory")
    assert as_freres_error(failure, "clip.mp4").message == "clip.mp4: not enough memory"
    with pytest.raises(ResourceError, match="the thing: out of memory"), memory_errors_as("the thing", "a hint"):
        raise failure


def test_a_question_that_does_not_fit_is_a_resource_error(bundle, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    session = session_module.open_session(
        session_module.AskRequest(bundle, make_source("bundled", "cpu").device), loaded_models()
    )
    for name in ("generate", "score_options", "find_evidence"):
        monkeypatch.setattr(session_module, name, fail)
    monkeypatch.setattr(batches, "score_options_batch", fail)
    question = Query("Which way?", ("left", "right"))
    for ask in (
        lambda: session.ask("Which way?"),
        lambda: session.ask("Which way?", choices=["left", "right"]),
        lambda: session.ask_many([question, question]),
        lambda: session.find_evidence(question),
    ):
        with pytest.raises(ResourceError, match="answering: out of memory"):
            ask()


def test_it_is_told_without_importing_torch():
    code = "import sys; from freres_cli.errors import is_out_of_memory as f; print(f(MemoryError()), 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "False"]
