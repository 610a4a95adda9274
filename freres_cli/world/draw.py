"""Rendering generated scenes with torch, on any device: every object is a signed distance, with smooth edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from freres_cli.world.scene import COLOUR_RGB, COLOURS, SHAPES, SIDE, Background, Camera, Haze, Scene, Thing

WINDOW = 34  # side of the square an object is drawn in, design px
MARGIN = WINDOW // 2 + 1
RIM = 2.0  # of outlined objects, design px
STRETCH_FRAMES = 64  # drawn at once; each takes about 2 MB at 192 px


@torch.no_grad()
def draw_scenes(scenes: Sequence[Scene], side_px: int = SIDE, device: str | torch.device = "cpu") -> list[Tensor]:
    """Return the frames of each scene: (T, side_px, side_px, 3) uint8 RGB. ``side_px``: a multiple of ``SIDE``."""
    if side_px % SIDE:
        raise ValueError(f"side_px: expected a multiple of {SIDE}, got {side_px}")
    scale = side_px // SIDE
    margin = MARGIN * scale
    canvas = torch.cat([_backgrounds(scene, scale, device) for scene in scenes])
    padded = torch.nn.functional.pad(canvas, (0, 0, margin, margin, margin, margin))
    lengths = [scene.num_frames for scene in scenes]
    # What is short-lived is in front of everything else, posts included.
    for is_outlined in (False, True):
        chosen = [[thing for thing in scene.things if thing.is_outlined == is_outlined] for scene in scenes]
        for layer in range(max(map(len, chosen))):
            _draw_layer(padded, [part[layer] if layer < len(part) else None for part in chosen], lengths, scale)
        if not is_outlined:
            _draw_posts(padded, scenes, scale)
    frames = padded[:, margin:-margin, margin:-margin]
    fade = torch.cat([torch.from_numpy(scene.fade) for scene in scenes]).to(frames)
    frames = frames * fade[:, None, None, None]
    for part, scene in zip(frames.split(lengths), scenes, strict=True):
        _add_noise(part, scene)
    return list(frames.round().clamp(0, 255).to(torch.uint8).split(lengths))


def _draw_posts(padded: Tensor, scenes: Sequence[Scene], scale: int) -> None:
    """Draw the posts into their frames, in place."""
    margin = MARGIN * scale
    axis = (torch.arange(padded.shape[2], dtype=torch.float32, device=padded.device) - margin + 0.5) / scale
    for frames, scene in zip(padded.split([scene.num_frames for scene in scenes]), scenes, strict=True):
        for post in scene.posts:
            centre = torch.from_numpy(post.centre).to(frames)[:, None]
            alpha = ((post.width / 2 - (axis - centre).abs()) * scale + 0.5).clamp(0, 1)[:, None, :, None]
            # Lighter in the middle, as a round post is.
            grey = post.grey - 20 * ((axis - centre) / post.width).square()[:, None, :, None]
            frames.add_((grey - frames) * alpha)


def _add_noise(frames: Tensor, scene: Scene) -> None:
    """Add the sensor's noise in place, from a seed for each frame, so that any part of a clip has that of the whole."""
    for frame, seed in zip(frames, scene.frame_seeds.tolist(), strict=False):
        generator = torch.Generator().manual_seed(seed)
        frame.add_(torch.randn(frame.shape[:2], generator=generator).to(frame)[..., None] * scene.noise)


def draw_stretches(scene: Scene, side_px: int = SIDE, num_frames: int = STRETCH_FRAMES) -> Iterator[Tensor]:
    """Yield the frames that ``draw_scenes`` draws for one scene, bit for bit, at most ``num_frames`` at a time: memory is
    bounded."""
    for start in range(0, scene.num_frames, num_frames):
        yield draw_scenes([scene.stretch(start, start + num_frames)], side_px)[0]


def _backgrounds(scene: Scene, scale: int, device: str | torch.device) -> Tensor:
    """(T, H, W, 3) float32."""
    parts = []
    for shot in scene.shots:
        length = shot.end - shot.start
        moves = shot.background.drift != (0.0, 0.0) or shot.camera is not None
        times = shot.elapsed + torch.arange(length if moves else 1, dtype=torch.float32, device=device)
        parts.append(draw_background(shot.background, times, scale, shot.camera, shot.haze).expand(length, -1, -1, -1))
    return torch.cat(parts)


def draw_background(
    background: Background, times: Tensor, scale: int, camera: Camera | None = None, haze: Haze | None = None
) -> Tensor:
    """Return a ``background`` at frames ``times`` (n,) of its shot: (n, H, W, 3) float32.

    ``scale``: px per design px. ``camera``, ``haze``: those of the shot, if it has them.
    """
    side = SIDE * scale
    axis = (torch.arange(side, dtype=torch.float32, device=times.device) + 0.5) / scale
    x = axis[None, None, :] + times[:, None, None] * background.drift[0]
    y = axis[None, :, None] + times[:, None, None] * background.drift[1]
    mist: Tensor | float = 0.0
    if camera is not None:
        index = times.long().cpu().numpy()
        offset = torch.from_numpy(camera.offset[index]).to(x)
        zoom = torch.from_numpy(camera.zoom[index]).to(x)[:, None, None]
        from_middle = axis - SIDE / 2
        x = from_middle[None, None, :] / zoom + SIDE / 2 + offset[:, 0, None, None]
        y = from_middle[None, :, None] / zoom + SIDE / 2 + offset[:, 1, None, None]
        if haze is not None:
            mist = _haze(haze, from_middle, offset)
    pattern = _texture(background, x, y).expand(len(times), side, side)
    slope = (axis[None, None, :] * background.gradient[0] + axis[None, :, None] * background.gradient[1]) / SIDE
    rgb = torch.tensor(background.rgb, dtype=torch.float32, device=times.device)
    return rgb + (pattern * background.contrast + slope + mist)[..., None]


def _haze(haze: Haze, axis: Tensor, offset: Tensor) -> Tensor:
    """(n, H, W) grey levels."""
    total = axis.new_zeros(len(offset), len(axis), len(axis))
    for fx, fy, phase, amplitude in haze.waves.tolist():
        along = fx * (axis[None] + haze.parallax * offset[:, :1])
        across = fy * (axis[None] + haze.parallax * offset[:, 1:]) + phase
        total += amplitude * (
            across.sin()[:, :, None] * along.cos()[:, None] + across.cos()[:, :, None] * along.sin()[:, None]
        )
    return total


def _texture(background: Background, x: Tensor, y: Tensor) -> Tensor:
    """Values in [-1, 1]."""
    wave = 2 * torch.pi / background.period
    if background.texture == "striped":
        return (torch.sin((y if background.is_upright else x) * wave) * 4).clamp(-1, 1)
    if background.texture == "checked":
        return (torch.sin(x * wave) * torch.sin(y * wave) * 6).clamp(-1, 1)
    if background.texture == "speckled":
        table = torch.from_numpy(background.speckles).to(x)
        size = len(table)
        rows, columns = (y / 3).floor().long() % size, (x / 3).floor().long() % size
        return table[rows, columns]
    return torch.zeros_like(x + y)


def _draw_layer(padded: Tensor, things: list[Thing | None], lengths: list[int], scale: int) -> None:
    """Draw at most one object into each frame, in place."""
    rows, centres, radii, shapes, colours, turns, rims = [], [], [], [], [], [], []
    start = 0
    for thing, length in zip(things, lengths, strict=True):
        if thing is not None:
            seen = torch.from_numpy(thing.visible.nonzero()[0])
            n = len(seen)
            rows.append(seen + start)
            centres.append(torch.from_numpy(thing.centre)[seen])
            radii.append(torch.full((n,), thing.radius))
            shapes.append(torch.full((n,), SHAPES.index(thing.shape)))
            white = torch.from_numpy(thing.is_white)[seen]
            colours.append(torch.where(white, len(COLOURS), COLOURS.index(thing.colour)))
            turns.append(torch.full((n,), thing.turn))
            rims.append(torch.full((n,), RIM if thing.is_outlined else 0.0))
        start += length
    if not rows or not sum(map(len, rows)):
        return
    device = padded.device
    frame, shape, colour, turn = (torch.cat(part).to(device) for part in (rows, shapes, colours, turns))
    centre, radius, rim = (torch.cat(part).float().to(device) for part in (centres, radii, rims))
    palette = torch.tensor([*(COLOUR_RGB[c] for c in COLOURS), (245, 245, 245)], dtype=torch.float32, device=device)
    size = WINDOW * scale
    corner = (centre * scale).floor().long() - size // 2
    steps = torch.arange(size, device=device)
    px = corner[:, None] + steps[None, :, None].expand(-1, -1, 2)  # (n, size, 2)
    offset = (px + 0.5) / scale - centre[:, None]
    distance = signed_distance(offset[:, None, :, 0], offset[:, :, None, 1], shape, turn, radius)
    alpha = (0.5 - (distance - rim[:, None, None]) * scale).clamp(0, 1)[..., None]
    inner = (0.5 - distance * scale).clamp(0, 1)[..., None]
    paint = palette[-1] + (palette[colour][:, None, None] - palette[-1]) * inner
    paint = torch.where(rim[:, None, None, None] > 0, paint, palette[colour][:, None, None])
    margin = MARGIN * scale
    side = padded.shape[1]
    place = (px + margin).clamp(0, side - 1)
    index = (frame[:, None, None] * side + place[:, :, None, 1]) * side + place[:, None, :, 0]
    flat = padded.view(-1, 3)
    # Windows of objects that left the frame are clamped to the margin, which is cut off.
    under = flat[index.reshape(-1)].view(*index.shape, 3)
    flat[index.reshape(-1)] = (under + (paint - under) * alpha).view(-1, 3)


def signed_distance(dx: Tensor, dy: Tensor, shape: Tensor, turn: Tensor, radius: Tensor) -> Tensor:
    """Return the distance to each object's edge in design px, negative inside: (n, s, s).

    ``dx`` (n, 1, s), ``dy`` (n, s, 1): offsets of pixels from the object's centre, in design px. ``shape``: (n,) index
    into ``SHAPES``. ``turn``: (n,) quarter turns clockwise, for arrows. ``radius``: (n,) in design px.
    """
    dx, dy = torch.broadcast_tensors(dx, dy)
    out = torch.empty_like(dx)
    for kind, name in enumerate(SHAPES):
        for quarter in range(4 if name == "arrow" else 1):
            chosen = shape == kind
            if name == "arrow":
                chosen = chosen & (turn == quarter)
            if not bool(chosen.any()):
                continue
            r = radius[chosen, None, None]
            u, v = dx[chosen] / r, dy[chosen] / r
            for _ in range(quarter):
                u, v = v, -u
            out[chosen] = _UNIT[name](u, v) * r
    return out


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return (u * u + v * v).sqrt() - 0.95


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.8


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v, 0.866 * u.abs() - 0.5 * v) - 0.5


def _cross(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), v.abs()
    return torch.minimum(torch.maximum(a - 0.95, b - 0.3), torch.maximum(a - 0.3, b - 0.95))


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return ((u * u + v * v).sqrt() - 0.72).abs() - 0.23


def _arrow(u: Tensor, v: Tensor) -> Tensor:
    a = u.abs()
    shaft = torch.maximum(a - 0.25, (v - 0.4).abs() - 0.6)
    head = torch.maximum(v - 0.05, (a - 0.85 * (v + 1)) / 1.31)
    return torch.minimum(shaft, head)


_UNIT = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring, "arrow": _arrow}
