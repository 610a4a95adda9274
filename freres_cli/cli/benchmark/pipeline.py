"""From file to bundle: the method after encoding, decoding, memory, bounded merging, and many clips in one command."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import torch

from freres_cli.bench.apart import FRERES
from freres_cli.bench.clock import StageTimer
from freres_cli.bench.report import summarize_ratios, summarize_runs
from freres_cli.cli.benchmark.inputs import GRID, METHOD, METHOD_FLAGS, TOWER, make_tower, write_video
from freres_cli.method import adaptive
from freres_cli.method.adaptive import StretchCompressor, build_stretch_tokens
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import compress_latents
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.encoding import VideoSource
from freres_cli.pipeline.planning import method_settings
from freres_cli.presets import load_settings
from freres_cli.records import FrameSize
from freres_cli.stretches import Stretches
from freres_cli.video.decode import decode_frames
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from freres_cli.world.make import CODECS, clip_seed, encode_scene, make_set
from freres_cli.world.script import make_scene


def time_runs(run: Callable[[], Any], repeat: int) -> list[float]:
    """Return the seconds that each of ``repeat`` runs took."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_method(repeat: int = 3, num_frames: int = 96) -> dict[str, Any]:
    """Time the tower on one 24x24 frame and everything after it per frame of a clip, in one process."""
    encoder = make_tower()
    size = encoder.frame_size(1280, 720, GRID)
    frame = torch.randint(0, 256, (1, size.height_px, size.width_px, 3), dtype=torch.uint8)
    encoder.encode(frame)
    encode = time_runs(lambda: encoder.encode(frame), repeat)
    chosen = load_settings("qwen2-vl-7b", {})
    settings = method_settings(chosen)
    plan = plan_budget(num_frames, GRID, settings, chosen.budget_tokens)
    phase = torch.linspace(0, 6, num_frames)[:, None, None, None]
    latents = torch.randn(*GRID, encoder.width) + torch.sin(phase) * torch.randn(*GRID, encoder.width)

    def compress() -> None:
        build_tokens(compress_latents(latents, range(num_frames), plan, settings, encoder.width))

    def merge() -> None:
        compressor = StretchCompressor(GRID, encoder.width, chosen.budget_tokens)
        compressor.push(latents, range(num_frames))
        build_stretch_tokens(compressor.finish())

    rows = {}
    for name, run in (("fre-res", compress), ("adaptive", merge)):
        run()
        after = [seconds / num_frames for seconds in time_runs(run, repeat)]
        share = summarize_runs(after)["median"] / summarize_runs(encode)["median"]
        rows[name] = {"method_s_per_frame": summarize_runs(after), "method_share_of_encoding": share}
    return {
        "tower": TOWER,
        "grid": GRID,
        "preset": "qwen2-vl-7b",
        "num_frames": num_frames,
        "warmup": 1,
        "runs": repeat,
        "dtype": "float32",
        "encode_s_per_frame": summarize_runs(encode),
        "methods": rows,
    }


def measure_decode(folder: Path, repeat: int = 5) -> dict[str, Any]:
    """Time our decoding of a 720p file with every frame resized, in turn with plain PyAV on the same file."""
    path = write_video(folder / "720p.mp4", num_frames=300, side=(1280, 720))
    info = probe_video(path)
    size = FrameSize(144, 144, 9, 9)

    def ours() -> None:
        for _ in decode_frames(path, info, Sampling("native"), size, 32):
            pass

    def plain(resize: bool) -> None:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                if resize:
                    frame.to_ndarray(format="rgb24", width=144, height=144)

    runs: dict[str, list[float]] = {"freres": [], "pyav_decode_only": [], "pyav_decode_and_resize": []}
    for counted in [False] + [True] * repeat:
        for name, run in (
            ("freres", ours),
            ("pyav_decode_only", lambda: plain(False)),
            ("pyav_decode_and_resize", lambda: plain(True)),
        ):
            seconds = time_runs(run, 1)
            runs[name] += seconds if counted else []
    ratios = {
        f"freres_over_{name}": summarize_ratios(runs["freres"], runs[name])
        for name in ("pyav_decode_only", "pyav_decode_and_resize")
    }
    video = "1280x720 H.264, 300 frames at 30 fps, every frame to 144x144 RGB"
    return {
        "video": video,
        "warmup": 1,
        "runs": repeat,
        **{f"{k}_s": summarize_runs(v) for k, v in runs.items()},
        **ratios,
    }


def measure_memory(folder: Path, repeat: int = 1) -> dict[str, Any]:
    """Measure peak memory of ``freres compress`` on one and ten minutes of 30 fps video, each in a fresh process."""
    videos = {
        minutes: write_video(folder / f"{minutes}min.mp4", num_frames=minutes * 1800, side=(288, 288))
        for minutes in (1, 10)
    }
    return {method: _measure_peaks(folder, videos, method, repeat) for method in ("fre-res", "adaptive")}


def _measure_peaks(folder: Path, videos: dict[int, Path], method: str, repeat: int) -> dict[str, Any]:
    peaks: dict[str, list[int]] = {}
    documents = {}
    for minutes, path in videos.items():
        for _ in range(repeat):
            output = ("--method", method, "-o", str(folder / "b.pt"), "--force", "--json")
            documents[minutes] = json.loads(run_command(str(path), "--budget", "6600", *output))
            peaks.setdefault(f"{minutes}_min", []).append(documents[minutes]["peak_memory_bytes"])
    ratio = summarize_runs(peaks["10_min"])["median"] / summarize_runs(peaks["1_min"])["median"]
    return {
        "command": f"freres compress VIDEO --method {method} --budget 6600 --json",
        "runs": repeat,
        "visual_tokens": {f"{m}_min": d["visual_tokens"] for m, d in documents.items()},
        "full_tokens": {f"{m}_min": d["full_tokens"] for m, d in documents.items()},
        "timings_s": {f"{m}_min": d["timings_s"] for m, d in documents.items()},
        "peak_memory_bytes": {name: summarize_runs(values) for name, values in peaks.items()},
        "ten_minutes_over_one": ratio,
    }


def measure_bounded(folder: Path, count: int = 3, num_frames: int = 360) -> dict[str, Any]:
    """Compare the quality of stretches merged in bounded memory with that of the same clips merged as a whole.

    ``count``: level 3 clips with at least ``num_frames`` frames.
    """
    compressor = Compressor()
    rows: list[dict[str, Any]] = []
    seeds = (clip_seed("validation", index) for index in itertools.count())
    long = (seed for seed in seeds if make_scene(seed, level=3).num_frames >= num_frames)
    for seed in itertools.islice(long, count):
        path = folder / f"{seed}.mp4"
        encode_scene(path, make_scene(seed, level=3), *CODECS[0][1:])
        clip = EncodedClip(
            VideoSource(path), compressor.options, compressor.models.encoder, StageTimer(torch.device("cpu"))
        )
        for share, part in itertools.product((0.05, 0.02), (4, 8, 16)):
            budget_tokens = int(share * clip.full_tokens)
            exact, bounded = (
                merge_in(clip, budget_tokens, most).quality for most in (clip.full_tokens, clip.full_tokens // part)
            )
            rows.append(
                {"seed": seed, "latents": clip.full_tokens, "budget_tokens": budget_tokens, "memory_share": 2 / part}
            )
            rows[-1] |= {"quality_exact": exact, "quality_bounded": bounded}
    worst = max(row["quality_exact"] - row["quality_bounded"] for row in rows)
    return {
        "clips": f"{count} of level 3, H.264, the first with at least {num_frames} frames",
        "rows": rows,
        "most_lost": worst,
    }


def merge_in(clip: EncodedClip, budget_tokens: int, most: int) -> Stretches:
    """Return a clip merged with at most 2 * ``most`` stretches in memory."""
    usual, adaptive.MOST_STRETCHES = adaptive.MOST_STRETCHES, most
    try:
        grid_h, grid_w, width = clip.latents.shape[1:]
        compressor = StretchCompressor((grid_h, grid_w), width, budget_tokens)
        compressor.push(clip.latents, clip.pts_seconds)
    finally:
        adaptive.MOST_STRETCHES = usual
    return compressor.finish()


def measure_many(folder: Path, count: int = 20, repeat: int = 3) -> dict[str, Any]:
    """Time ``freres compress`` on short clips: one command for all of them, in turn with one command per clip.

    ``load_s`` is the time spent loading the tower, for the first clip and for all the others together.
    """
    clips = folder / "clips"
    clips.mkdir()
    videos = [clips / made.file for made in make_set(clips, "test", count)]
    walls: dict[str, list[float]] = {"one_command": [], "a_command_each": []}
    loads: dict[str, list[float]] = {"first": [], "others": []}
    for run in range(repeat):
        out = folder / f"many-{run}"
        start = time.perf_counter()
        rows = [
            json.loads(line) for line in run_command(str(clips), *METHOD_FLAGS, "-o", str(out), "--json").splitlines()
        ]
        walls["one_command"].append(time.perf_counter() - start)
        loads["first"].append(rows[0]["timings_s"]["load"])
        loads["others"].append(sum(row["timings_s"]["load"] for row in rows[1:]))
        start = time.perf_counter()
        for video in videos:
            run_command(str(video), *METHOD_FLAGS, "-o", str(folder / f"alone-{run}-{video.stem}.pt"), "--json")
        walls["a_command_each"].append(time.perf_counter() - start)
    ratios = [one / each for one, each in zip(walls["one_command"], walls["a_command_each"], strict=True)]
    return {
        "commands": [
            f"freres compress CLIPS/ --method {METHOD} -o BUNDLES/ --json",
            f"freres compress CLIP --method {METHOD} -o BUNDLE --json, for each clip",
        ],
        "clips": f"{count} of freres world make --split test, 4 to 5 s at 8 fps",
        "warmup": 0,
        "runs": repeat,
        **{f"{name}_s": summarize_runs(values) for name, values in walls.items()},
        "one_command_over_a_command_each": summarize_runs(ratios),
        "load_s": {name: summarize_runs(values) for name, values in loads.items()},
    }


def run_command(*arguments: str) -> str:
    """Run ``freres compress`` in its own process and return what it prints."""
    return subprocess.run([*FRERES, "compress", *arguments], capture_output=True, text=True, check=True).stdout
