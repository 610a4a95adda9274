"""``compress`` never loads the language model and ``ask`` never the tower: two layers with Qwen2-VL-2B's widths."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors import safe_open

from tests.tiny_models import make_qwen2_vl

# Private memory, sampled while a half is loaded; pages of the mapped file do not count.
MEASURE = """
import sys, threading
from pathlib import Path
from freres_cli.backbones.registry import load_language_model, load_vision_encoder
from freres_cli.devices import choose_device
import freres_cli.backbones.qwen2_vl

def resident_bytes():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident_bytes())

load = {"vision": load_vision_encoder, "language": load_language_model}[sys.argv[1]]
before = peak = resident_bytes()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
half = load(sys.argv[2], choose_device("cpu"))
done.set()
watcher.join()
print(max(peak, resident_bytes()) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_half_never_takes_memory_for_the_other(tmp_path):
    make_qwen2_vl(tmp_path, layers=2, hidden=1536, intermediate=8960, depth=2, tower=1280)
    sizes = {"vision": 0, "language": 0}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            num_values = 1
            for side in file.get_slice(key).get_shape():
                num_values *= side
            sizes["vision" if "visual." in key else "language"] += 4 * num_values
    # The projector is read again for its digest, one tensor at a time: at most 5120 x 5120 floats.
    slack = 4 * 5120**2 + 48 * 2**20
    for half, own in sizes.items():
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, half, str(tmp_path)], capture_output=True, text=True, check=True
        )
        peak, other = int(run.stdout), sum(sizes.values()) - own
        assert own - 16 * 2**20 < peak < own + slack < own + other, (half, peak, own, other)
