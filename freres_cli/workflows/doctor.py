"""Find out what this machine can run, by trying it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import av
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from freres_cli.backbones.fused import find_kernels
from freres_cli.backbones.registry import FAMILIES, KNOWN_CHECKPOINTS, import_half
from freres_cli.bench.clock import total_memory_bytes
from freres_cli.devices import choose_device
from freres_cli.errors import BackboneError, FreresError, ResourceError
from freres_cli.pipeline.models import find_device, find_dtype
from freres_cli.presets import environment_value
from freres_cli.video.nvdec import choose_gpu
from freres_cli.world.bundled_model import bundled_model_dir

CODECS = {"h264": True, "hevc": False, "vp9": False, "libdav1d": False, "mpeg4": False}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    ``part``: what was checked. ``state``: ``ok``, ``limited`` or ``missing``. ``text``: what was found. ``is_needed``:
    whether ``freres compress`` and ``freres ask`` need it.
    """

    part: str
    state: str
    text: str
    is_needed: bool = False


def examine_machine() -> list[Finding]:
    """Return a finding for each part that freres uses."""
    device = [*_devices(), _attention(), *_kernels(), *_gpu_decoder(), _memory()]
    machine = [_packages(), *_defaults(), _decoders(), _encoder(), *device, _bundled_model(), _hub()]
    return [*machine, *(_family(model_type) for model_type in FAMILIES)]


def _packages() -> Finding:
    names = ("torch", "transformers", "av", "typer", "safetensors", "tokenizers")
    try:
        found = ", ".join(f"{name} {version(name)}" for name in names)
    except PackageNotFoundError as error:
        return Finding("packages", "missing", f"{error}: install freres with pip", True)
    return Finding("packages", "ok", f"Python {platform.python_version()}, {found}", True)


def _defaults() -> list[Finding]:
    """Report the defaults that the environment sets, by choosing them: a bad one ends every command with a model."""
    found = []
    for flag, choose in (("device", find_device), ("dtype", find_dtype)):
        part, value = f"FRERES_{flag.upper()}", environment_value(flag)
        if value is None:
            continue
        try:
            choose()
        except FreresError as error:
            found.append(Finding(part, "missing", "; ".join(filter(None, (error.message, error.hint))), True))
        else:
            found.append(Finding(part, "ok", f"{value}, where no --{flag} is given", True))
    return found


def _decoders() -> Finding:
    missing = [name for name in CODECS if name not in av.codecs_available]
    if not missing:
        return Finding("decoders", "ok", f"{', '.join(CODECS)}, {len(av.codecs_available)} in all", True)
    state = "missing" if any(CODECS[name] for name in missing) else "limited"
    return Finding("decoders", state, f"this PyAV cannot decode {', '.join(missing)}", True)


def _encoder() -> Finding:
    try:
        av.Codec("libx264", "w")
    except (av.FFmpegError, ValueError):  # a name that this FFmpeg does not know is the latter
        return Finding("encoder", "limited", "no libx264: 'freres demo' cannot run, 'freres profile' needs a video")
    return Finding("encoder", "ok", "libx264, for the clips that freres makes itself")


def _devices() -> list[Finding]:
    device = choose_device("cpu")
    features = torch.backends.cpu.get_cpu_capability()
    found = [Finding("cpu", "ok", f"{device.description}, {features}", True)]
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device or driver found"
        return [*found, Finding("cuda", "missing", f"{built}: models run on the CPU, large ones slowly")]
    for index in range(torch.cuda.device_count()):
        found.append(Finding(f"cuda:{index}", "ok", choose_device(f"cuda:{index}").description))
    return found


def _attention() -> Finding:
    """Report what --attn auto chooses, and whether --attn flash can run."""
    note = choose_device().attention_note.removeprefix("attention ")
    try:
        flash = choose_device(attention="flash").attention_note.rpartition(", ")[2]
    except ResourceError as error:
        return Finding("attention", "ok", f"{note}; --attn flash cannot run: {error.message.partition(': ')[2]}")
    return Finding("attention", "ok", f"{note}; --attn flash: {flash}")


def _kernels() -> list[Finding]:
    """Report whether the first CUDA device has kernels for norms, rotations and gates, by trying them."""
    if not torch.cuda.is_available():
        return []
    _, note = find_kernels(torch.device("cuda:0"), torch.bfloat16)
    text = "norms, rotations and gates of models in 16 bits have one kernel each, by Triton"
    return [Finding("kernels", "ok", text) if note is None else Finding("kernels", "limited", note)]


def _gpu_decoder() -> list[Finding]:
    """Report whether ``--decode gpu`` works on the first CUDA device, by asking for it."""
    if not torch.cuda.is_available():
        return []
    try:
        choose_gpu(0)
    except ResourceError as error:
        return [Finding("decoding on the GPU", "limited", f"{error.message}: {error.hint}")]
    return [Finding("decoding on the GPU", "ok", "--decode gpu: NVDEC")]


def _memory() -> Finding:
    total = memory_bytes()
    disk = shutil.disk_usage(Path.cwd()).free
    text = f"{total / GIB:.0f} GiB of memory, {disk / GIB:.0f} GiB free on this disk"
    return Finding("memory", "ok" if total > 4 * GIB and disk > GIB else "limited", text)


def memory_bytes() -> int:
    """Return the memory of the machine in bytes."""
    return total_memory_bytes(torch.device("cpu"))


def model_memory_bytes() -> int:
    """Return the memory for models in bytes: of the largest CUDA device, or of the machine if there is none."""
    if not torch.cuda.is_available():
        return memory_bytes()
    return max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def _family(model_type: str) -> Finding:
    """Report whether the family's classes are installed, and which of its known checkpoints fit in memory.

    The weights of both halves are counted, although a command loads only one: the other leaves room for cache and
    activations.
    """
    try:
        for half in ("vision", "language"):
            import_half(model_type, half)
    except BackboneError as error:
        reason = error.message.removeprefix(f"{model_type}: ")
        return Finding(model_type, "missing", f"{reason}: {error.hint}")
    known = [checkpoint for checkpoint in KNOWN_CHECKPOINTS if checkpoint.family == model_type]
    sized = [(c.model_id.rpartition("/")[2], c.weight_bytes) for c in known if c.weight_bytes is not None]
    room = model_memory_bytes()
    fitting = [f"{name} ({size / GIB:.1f} GiB)" for name, size in sized if size <= room]
    others = [f"{name} ({size / GIB:.1f} GiB)" for name, size in sized if size > room]
    texts = [f"in bfloat16 there is room for {', '.join(fitting)}"] if fitting else []
    if others:
        texts.append(f"{room / GIB:.0f} GiB is not enough for {', '.join(others)}")
    if not sized:
        texts.append("its classes are installed; the sizes of its checkpoints are not known")
    return Finding(model_type, "limited" if others else "ok", "; ".join(texts))


def _bundled_model() -> Finding:
    weights = bundled_model_dir() / "model.safetensors"
    if not weights.is_file():
        return Finding("bundled", "missing", f"{weights} is missing: install freres again", True)
    return Finding("bundled", "ok", "the bundled model is installed; it only knows its own world of drawn shapes", True)


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("hub", "limited", "HF_HUB_OFFLINE is set: only downloaded models can be used by id")
    folder = Path(HF_HUB_CACHE)
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    if not os.access(place, os.W_OK):
        return Finding("hub", "limited", f"{folder} is not writable: set HF_HOME to a folder for downloads")
    free = shutil.disk_usage(place).free
    text = f"models named by id are downloaded on first use (not tried now); {free / GIB:.0f} GiB free for them"
    return Finding("hub", "ok" if free > 4 * GIB else "limited", text)
