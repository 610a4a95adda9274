"""The environment of a measurement, and the spread of repeated runs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from freres_cli import __version__
from freres_cli.devices import Device, fit_attention


def describe_environment(device: Device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return machine, device and versions, as in every ``--json`` document."""
    return {
        "freres": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "av": version("av"),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.name,
        "device_description": device.description,
        "attention": device.attention if dtype is None else fit_attention(device, dtype)[0],
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }


def summarize_runs(values: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize_ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of ``values`` to ``others``, which were measured in turn: machines are noisy, and what
    slows both of a pair leaves its ratio."""
    return summarize_runs([a / b for a, b in zip(values, others, strict=True)])
