"""Fixtures of the pipeline's tests: a short clip, its bundle, and the folder of a tiny model.

A test file imports the fixtures it uses, and those they depend on, by name.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest

from freres_cli.pipeline.models import ModelSource
from freres_cli.pipeline.planning import CompressOptions
from freres_cli.presets import BUNDLED, load_settings
from freres_cli.world.clip import make_clip
from tests.runner import run_freres
from tests.tiny_models import CPU, make_qwen2_vl

BUDGET = 300
FULL_TOKENS = 60 * 36  # frames of the clip, tokens of a frame
SCRIPT = Path(sys.executable).parent / "freres"
# The installed command, for tests that need a process of their own.
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-c", "from freres_cli.cli.app import main; main()"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds at 30 fps, with a cut in the middle."""
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=2.0)


@pytest.fixture(scope="module")
def bundle(clip, tmp_path_factory):
    """What ``freres compress --budget 300`` writes for the clip."""
    path = tmp_path_factory.mktemp("bundle") / "bundle.pt"
    assert run_freres("compress", clip, "--method", "fre-res", "--budget", BUDGET, "-o", path).status == 0
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny Qwen2-VL, and its stock model."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_qwen2_vl(folder)


def options_with(**flags) -> CompressOptions:
    """The options that ``freres compress`` makes of these flags, for the bundled model."""
    return CompressOptions(ModelSource(BUNDLED, CPU), load_settings(BUNDLED, flags), "fre-res")


@pytest.fixture
def forked(monkeypatch):
    """Processes that start at once, without importing anything."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
