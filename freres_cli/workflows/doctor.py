"""What this machine can run, found out by trying."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import av
import torch

from freres_cli.devices import choose_device
from freres_cli.world.bundled_model import bundled_model_dir, bundled_model_info

CODECS = {"h264": True, "hevc": False, "vp9": False, "libdav1d": False, "mpeg4": False}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One checked part: ``state`` is ok, limited or missing; ``is_needed`` for the main job."""

    part: str
    state: str
    text: str
    is_needed: bool = False


def examine_machine() -> list[Finding]:
    """Return a finding for each part that freres uses."""
    return [_packages(), _decoders(), _encoder(), *_devices(), _memory(), _bundled_model(), _hub()]


def _packages() -> Finding:
    names = ("torch", "transformers", "av", "typer", "safetensors", "tokenizers")
    try:
        found = ", ".join(f"{name} {version(name)}" for name in names)
    except PackageNotFoundError as error:
        return Finding("packages", "missing", f"{error}: install freres with pip", True)
    return Finding("packages", "ok", f"Python {platform.python_version()}, {found}", True)


def _decoders() -> Finding:
    missing = [name for name in CODECS if name not in av.codecs_available]
    if not missing:
        return Finding("decoders", "ok", f"{', '.join(CODECS)}, {len(av.codecs_available)} in all", True)
    state = "missing" if any(CODECS[name] for name in missing) else "limited"
    return Finding("decoders", state, f"this PyAV cannot decode {', '.join(missing)}", True)


def _encoder() -> Finding:
    try:
        av.Codec("libx264", "w")
    except av.FFmpegError:
        return Finding("encoder", "limited", "no libx264: 'freres demo' and 'freres profile' need a video of yours")
    return Finding("encoder", "ok", "libx264, for clips that freres makes itself")


def _devices() -> list[Finding]:
    device = choose_device("cpu")
    features = torch.backends.cpu.get_cpu_capability()
    found = [Finding("cpu", "ok", f"{device.description}, {features}", True)]
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver is seen"
        return [*found, Finding("cuda", "missing", f"{built}: models run on the CPU, large ones slowly")]
    for index in range(torch.cuda.device_count()):
        found.append(Finding(f"cuda:{index}", "ok", choose_device(f"cuda:{index}").description))
    if find_spec("flash_attn") is None:
        found.append(
            Finding("attention", "ok", "PyTorch's own kernels (SDPA); flash_attn is not installed and not needed")
        )
    return found


def _memory() -> Finding:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    disk = shutil.disk_usage(Path.cwd()).free
    text = f"{pages / GIB:.0f} GiB of memory, {disk / GIB:.0f} GiB free on this disk"
    return Finding("memory", "ok" if pages > 4 * GIB and disk > GIB else "limited", text)


def _bundled_model() -> Finding:
    weights = bundled_model_dir() / "model.safetensors"
    if not weights.is_file():
        return Finding("bundled", "missing", f"{weights} is not there: install freres again", True)
    if not bundled_model_info().get("freres_trained"):
        return Finding("bundled", "limited", "the bundled model is there, untrained: its answers mean nothing", True)
    return Finding("bundled", "ok", "the bundled model is there", True)


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("hub", "limited", "HF_HUB_OFFLINE is set: only models already downloaded can be named by id")
    return Finding("hub", "ok", "models named by id are downloaded when first used (not tried now)")
