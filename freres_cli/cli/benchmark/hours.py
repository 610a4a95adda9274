"""The part ``hours`` of the benchmark: memory, time and size of bundles against the length of the video."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import av

from freres_cli.bench.apart import FRERES
from freres_cli.cli.benchmark.inputs import write_video

BASE_MINUTES = 10
FPS, SAMPLE_FPS = 30, 1
BUDGET_TOKENS = 6600
SIDE = (160, 96)
LATE_S, LATE_LENGTH_S = 0.95, 60  # --start as a share of the video, and seconds read from there
FOUR_K, FOUR_K_FRAMES = (3840, 2160), 90


def measure_hours(folder: Path, minutes: list[int]) -> dict[str, Any]:
    """Compress 30 fps videos of different lengths, each in a fresh process, with both forms of Fre-Res.

    ``folder``: for the files. ``minutes``: lengths, shortest first; all are the same ten minutes, repeated.
    The longest is also read through a pipe and from a late start, and a short clip of 3840x2160 is compressed.
    """
    base = write_video(folder / "base.mp4", BASE_MINUTES * 60 * FPS, SIDE)
    videos = {count: repeat_video(base, folder / f"{count}.mp4", count // BASE_MINUTES) for count in minutes}
    sampling = ("--budget", str(BUDGET_TOKENS), "--fps", str(SAMPLE_FPS))
    methods = {}
    for method in ("adaptive", "fre-res"):
        rows = [
            {"minutes": count, **_compress(path, folder, *sampling, "--method", method)}
            for count, path in videos.items()
        ]
        first, last = rows[0], rows[-1]
        methods[method] = {
            "rows": rows,
            "longest_over_shortest": last["peak_memory_bytes"] / first["peak_memory_bytes"],
            "bundle_bytes_per_hour": (last["bundle_bytes"] - first["bundle_bytes"])
            * 60
            / max(1, last["minutes"] - first["minutes"]),
        }
    longest = videos[minutes[-1]]
    start_s = LATE_S * minutes[-1] * 60
    late = ("--start", f"{start_s:g}", "--end", f"{start_s + LATE_LENGTH_S:g}")
    large = write_video(folder / "large.mp4", FOUR_K_FRAMES, FOUR_K)
    return {
        "videos": f"{SIDE[0]}x{SIDE[1]} H.264, {FPS} fps, {BASE_MINUTES} minutes with a cut every four seconds, repeated",
        "command": f"freres compress VIDEO {' '.join(sampling)} --method METHOD --json",
        "runs": 1,
        "methods": methods,
        "pipe": {
            "minutes": minutes[-1],
            **_compress(longest, folder, *sampling, "--method", "adaptive", is_piped=True),
        },
        "late_start": {"start_s": start_s, **_compress(longest, folder, *sampling, *late, "--method", "adaptive")},
        "4k": {
            "size": list(FOUR_K),
            "frames": FOUR_K_FRAMES,
            **_compress(large, folder, *sampling, "--method", "adaptive"),
        },
    }


def _compress(video: Path, folder: Path, *flags: str, is_piped: bool = False) -> dict[str, Any]:
    arguments = ["-" if is_piped else str(video), *flags, "-o", str(folder / "b.pt"), "--force", "--json"]
    with video.open("rb") as file:
        done = subprocess.run([*FRERES, "compress", *arguments], stdin=file, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    keys = ("peak_memory_bytes", "bundle_bytes", "visual_tokens", "full_tokens", "timings_s")
    return {"video_bytes": video.stat().st_size, **{key: document[key] for key in keys}}


def repeat_video(source: Path, target: Path, times: int) -> Path:
    """Write the packets of a video several times, one after the other, without encoding them again."""
    with av.open(str(target), "w") as writer:
        copy, shift = None, 0
        for _ in range(times):
            with av.open(str(source)) as reader:
                stream = reader.streams.video[0]
                copy = copy or writer.add_stream_from_template(stream)
                length = 0
                for packet in reader.demux(stream):
                    if packet.dts is None or packet.pts is None:
                        continue
                    length = max(length, packet.pts + (packet.duration or 0))
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = copy
                    writer.mux(packet)
                shift += length
    return target
