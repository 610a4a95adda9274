"""Mutated videos and bundles, each made from a number alone, and what must hold for every one of them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import struct
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch

from freres_cli.bundle.store import write_bundle
from freres_cli.cli.inspect import print_report
from freres_cli.errors import FreresError
from freres_cli.pipeline.bundle import load_bundle
from freres_cli.records import FrameSize
from freres_cli.video.decode import decode_frames
from freres_cli.video.probe import probe_video
from freres_cli.video.sampling import Sampling
from freres_cli.workflows.inspect import inspect_bundle
from tests import clips, forged_bundles

SMALL = FrameSize(32, 32, 1, 1)
RAW = {"codec": "rawvideo"}
# Name of the file: how it is written. Those that this build cannot write are left out.
VIDEOS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264.mkv": {"audio": "last"},
    "h264.ts": {"audio": "first"},
    "h264.flv": {},
    "h264.avi": {"options": clips.X264_P_FRAMES},
    "h264.h264": {},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "index_first.mp4": {"container_options": {"movflags": "faststart"}, "audio": "last"},
    "two.mp4": {"more_streams": 1},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=none:frame-threads=1"}},
    "vp8.webm": {"codec": "libvpx", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4.3gp": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "color_range": 2},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "color_range": 2},
    "ffv1.mkv": {"codec": "ffv1"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "theora.ogv": {"codec": "libtheora"},
    "flv1.flv": {"codec": "flv"},
    "wmv2.wmv": {"codec": "wmv2"},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "gif.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "apng.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "raw.nut": {**RAW, "pix_fmt": "yuv420p"},
    "raw.y4m": {"codec": "wrapped_avframe"},
}
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
EVIL: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**53, 2**63, 10**400, 1e308, -1e308, 0.5, math.nan, math.inf, "", "x", "\x1b[2J"),
    *([], [0], [[[]]], {}, {"value": 1}, "é" * 3000),
)


@cache
def video_bases(folder: Path) -> tuple[bytes, ...]:
    """The whole files, written once."""
    found = []
    for name, made in VIDEOS.items():
        made = dict(made)
        if not clips.has_encoder(made.get("codec", "libx264")):
            continue
        if made.get("more_streams"):
            made["more_streams"] = [clips.numbered(12)]
        try:
            found.append((name, clips.write_clip(folder / name, 24, **made).read_bytes()))
        except (OSError, ValueError):
            continue
    return tuple(found)


def mutate(data: bytes, dice: random.Random, other: bytes) -> bytes:
    """The bytes with one to six changes: flips, extreme numbers, cuts, doubled, swapped, blank and foreign parts."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3, 6))):
        if len(changed) < 16:
            break
        # Headers are where a byte matters most.
        size = len(changed) if dice.random() < 0.5 else min(len(changed), 1024)
        at, length = dice.randrange(size), dice.choice((1, 2, 4, 8, 64, 700))
        match dice.randrange(8):
            case 0:
                for _ in range(dice.choice((1, 4, 30))):
                    changed[dice.randrange(size)] = dice.randrange(256)
            case 1:
                changed[at] ^= 1 << dice.randrange(8)
            case 2:
                width, order = dice.choice((1, 2, 4, 8)), dice.choice("<>")
                value = dice.choice(EXTREMES) & (2 ** (8 * width) - 1)
                changed[at : at + width] = struct.pack(order + {1: "B", 2: "H", 4: "I", 8: "Q"}[width], value)
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length]
            case 5:
                changed[at : at + length] = bytes(length)
            case 6:
                start = dice.randrange(max(1, len(other)))
                changed[at : at + length] = other[start : start + length]
            case 7:
                del changed[dice.randrange(len(changed)) :]
    return bytes(changed)


def make_video(number: int, folder: Path) -> Path:
    """Write mutated video ``number``."""
    dice = random.Random(f"video {number}")
    bases = video_bases(folder / "bases")
    name, data = dice.choice(bases)
    path = folder / f"case_{name}"
    path.write_bytes(mutate(data, dice, dice.choice(bases)[1]))
    return path


def check_video(path: Path, number: int) -> str:
    """Probe and decode it. Return the kind of outcome; raise ``AssertionError`` for a wrong result."""
    dice = random.Random(number)
    start = dice.choice((None, None, 0.4))
    sampling = dice.choice(
        (
            Sampling("native", start_s=start),
            Sampling("fps", fps=5, start_s=start),
            Sampling("count", count=6, start_s=start),
        )
    )
    runs: list[tuple[tuple[float, ...], bytes]] = []
    for _ in range(2 if number % 10 == 0 else 1):
        info = probe_video(path)
        times: list[float] = []
        digest = hashlib.sha256()
        for batch in decode_frames(path, info, sampling, SMALL, strict=number % 7 == 0):
            assert tuple(batch.pixels.shape) == (len(batch.pts_seconds), 32, 32, 3)
            times += batch.pts_seconds
            digest.update(batch.pixels.numpy().tobytes())
        assert times and times == sorted(times) and all(map(math.isfinite, times))
        assert sampling.count is None or len(times) <= sampling.count
        runs.append((tuple(times), digest.digest()))
    assert all(times == runs[0][0] for times, _ in runs), "two runs give different frames"
    # Damage that a decoder does not report may show what another of its threads left in memory.
    return "decoded" if len(set(runs)) == 1 else "decoded, pixels not the same twice"


@cache
def bundle_bases(folder: Path) -> tuple[Path, ...]:
    """One bundle of each content."""
    latents = forged_bundles.smooth_latents()
    made = (
        forged_bundles.make_tracks(latents),
        forged_bundles.make_tokens(latents),
        forged_bundles.make_stretches(latents),
    )
    paths = []
    for content in made:
        path = folder / f"{type(content).__name__}.pt"
        write_bundle(path, content, forged_bundles.manifest_for(content), force=True)
        paths.append(path)
    return tuple(paths)


def make_bundle(number: int, folder: Path) -> Path:
    """Write mutated bundle ``number``: changed bytes, or a changed manifest or tensor with a checksum that is right."""
    dice = random.Random(f"bundle {number}")
    bases = bundle_bases(folder / "bases")
    base, path = dice.choice(bases), folder / "case.pt"
    kind = dice.choice(("bytes", "manifest", "manifest", "tensor", "tensor"))
    if kind == "bytes":
        path.write_bytes(mutate(base.read_bytes(), dice, dice.choice(bases).read_bytes()))
        return path
    outer = torch.load(base, weights_only=True)
    manifest = json.loads(outer["manifest"])
    for _ in range(dice.choice((1, 1, 2))):
        (_change_tree(manifest, dice) if kind == "manifest" else _change_tensor(outer["tensors"], dice))
    if kind == "tensor" and dice.random() < 0.7:
        manifest["tensors"] = forged_bundles.describe_tensors(outer["tensors"])
    text = json.dumps(manifest)
    digest = hashlib.sha256(text.encode()).hexdigest()
    torch.save({**outer, "manifest": text, "manifest_sha256": digest}, path)
    return path


def _change_tree(tree: dict[str, Any], dice: random.Random) -> None:
    """Replace, remove or add one value somewhere in a document."""
    while True:
        key = dice.choice(sorted(tree))
        if isinstance(tree[key], dict) and tree[key] and dice.random() < 0.85:
            tree = tree[key]
            continue
        if dice.random() < 0.15:
            del tree[key]
        else:
            tree[dice.choice((key, key, key, "more"))] = dice.choice(EVIL)
        return


def _change_tensor(tensors: dict[str, torch.Tensor], dice: random.Random) -> None:
    """Change one tensor's values, dtype, shape or name."""
    name = dice.choice(sorted(tensors))
    tensor = tensors[name].clone()
    flat, kind = tensor.view(-1), dice.randrange(7)
    if kind == 0 and len(flat):
        big = (
            dice.choice((-1, 2**31, 2**62, 255))
            if not tensor.is_floating_point()
            else dice.choice((math.nan, math.inf, -1e30, 1e38))
        )
        flat[dice.randrange(len(flat))] = torch.tensor(big).to(tensor.dtype)
    elif kind == 1:
        tensor = tensor.to(dice.choice((torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)))
    elif kind == 2:
        tensor = tensor[: max(0, len(tensor) - dice.choice((1, 5, 10**6)))].clone()
    elif kind == 3:
        tensor = torch.cat([tensor, tensor[:1]])
    elif kind == 4:
        tensor = tensor.flip(0).contiguous()
    elif kind == 5:
        del tensors[name]
        return
    else:
        tensor = tensor[None].clone()
    tensors[name] = tensor


def check_bundle(path: Path, number: int) -> str:
    """Read it, and what is read must do for tokens, the screen of inspect, and a smaller bundle."""
    bundle = load_bundle(path)
    tokens = bundle.tokens("none" if number % 2 else None)
    assert bool(torch.isfinite(tokens.positions).all()) and bool(torch.isfinite(tokens.seconds).all())
    with redirect_stdout(io.StringIO()):
        print_report(inspect_bundle(path), show_all=bool(number % 3))
    smaller = bundle.repack(max(1, len(tokens) // 2))
    assert smaller.num_visual_tokens <= max(1, len(tokens) // 2)
    return "read"


CHECKS: dict[str, tuple[Callable[[int, Path], Path], Callable[[Path, int], str]]] = {
    "videos": (make_video, check_video),
    "bundles": (make_bundle, check_bundle),
}


def run_case(kind: str, number: int, folder: Path) -> str:
    """Return the outcome of a case: what was done, or the name of the error. Anything else is raised."""
    make, check = CHECKS[kind]
    (folder / "bases").mkdir(parents=True, exist_ok=True)
    path = make(number, folder)
    try:
        return check(path, number)
    except FreresError as error:
        assert error.message and "\n" not in error.message, "the message is not one line"
        return type(error).__name__
    finally:
        path.unlink(missing_ok=True)
