"""``compress_s`` of methods on a GPU stands beside that of peers on the CPU: a note says so where both appear."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from freres_cli.bench.clock import StageTimer
from freres_cli.pipeline.notes import describe_times
from freres_cli.workflows.compare import compare
from freres_cli.workflows.evaluate import evaluate
from tests.evaluations import make_request, write_clips, write_questions
from tests.labelled_device import LABELLED
from tests.loaded_models import loaded_models
from tests.test_cli_compare import request_for
from tests.tiny_models import CPU

NOTE = "compress_s: adaptive ran on cuda:0, uniform on the CPU: not to be compared"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("times"))


def on_device(request):
    """The same request, for a device that is not there."""
    model = replace(request.options.model, device=LABELLED)
    return replace(request, options=replace(request.options, model=model))


def test_which_methods_are_told_apart():
    methods = ("full", "uniform", "adaptive", "uniform", "fre-res", "cdpruner", "fastv", "blind")
    assert describe_times(methods, LABELLED) == (
        "compress_s: adaptive, fre-res ran on cuda:0, uniform, cdpruner on the CPU: not to be compared",
    )
    assert not describe_times(methods, CPU)
    assert not describe_times(("full", "adaptive", "fre-res", "fastv", "blind"), LABELLED)
    assert not describe_times(("full", "uniform", "cdpruner"), LABELLED)


@pytest.mark.parametrize("verb", ["compare", "eval"])
def test_the_verbs_say_so(folder, monkeypatch, verb):
    if verb == "compare":
        work, request = compare, request_for(folder / "clip0.mp4", "uniform,adaptive")
    else:
        work, request = evaluate, make_request(write_questions(folder), "uniform,adaptive", "0.5", limit=1)
    # The models stay on the CPU, where no event can be timed.
    monkeypatch.setattr(f"{work.__module__}.StageTimer", lambda _: StageTimer(torch.device("cpu")))
    assert NOTE in work(on_device(request), models=loaded_models()).notes
