"""Draw maps over a grid of cells: heat maps, labels and colour scales. PNG and JPEG files are written with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import torch
from torch import Tensor

from freres_cli.errors import ResourceError

MAP_PX = 192  # longer side of a map; a grid finer than this gets one pixel per cell
GAP_PX = 12
BAR_PX = 14
GLYPH_PX = 2  # side of one dot of a letter
LINE_PX = 20
# From the lowest to the highest value, evenly spaced, each lighter than the last: black, blue, violet, orange, yellow.
SCALE_RGB = ((0, 0, 0), (40, 20, 110), (150, 40, 130), (240, 110, 50), (255, 245, 160))
PAPER, INK = 255, 0

GLYPH_COLUMNS, GLYPH_ROWS = 3, 5
CHARACTERS = "0123456789.-+ABCDEFGHIJKLMNOPQRSTUVWXYZ "
# Five rows of three dots for each character, one octal digit per row.
GLYPHS = (
    "75557262277174771717557117471774757711117575775717000020070002720"
    "25755656563444365556746477464434553557557222711152556554444757755"
    "6555525552656442556365655342167222255557555525577555255552227124700000"
)


def draw_maps(maps: Tensor, labels: Sequence[str], titles: Sequence[str], note: str = "") -> Tensor:
    """Draw ``maps`` as a picture (height, width, 3) uint8 RGB.

    ``maps`` is (rows, columns, cells down, cells across), with no negative values. ``labels`` go to the left of the
    rows, ``titles`` above the columns and ``note`` at the bottom, all in capitals; they may contain letters, digits,
    spaces and ``.+-``. All rows of a column share one colour scale, from 0 to the column's largest value, which is shown
    by a bar below it.
    """
    cell_px = max(1, MAP_PX // max(maps.shape[2:]))
    down_px, across_px = (cells * cell_px for cells in maps.shape[2:])
    peaks = maps.amax((0, 2, 3)).tolist()
    ends = [f"{peak:.3g}" for peak in peaks]
    left = GAP_PX + max(map(_text_px, labels)) + GAP_PX
    step_x = GAP_PX + max(across_px, *(_text_px(title) for title in titles), *(_text_px(f"0 {end}") for end in ends))
    step_y = down_px + GAP_PX
    top = GAP_PX + LINE_PX
    bar = top + len(labels) * step_y
    width = max(left + len(titles) * step_x, GAP_PX + _text_px(note) + GAP_PX)
    picture = torch.full((bar + BAR_PX + (3 if note else 2) * LINE_PX, width, 3), PAPER, dtype=torch.uint8)
    for row, label in enumerate(labels):
        _write(picture, label, top + row * step_y, GAP_PX)
    for column, (title, peak, end) in enumerate(zip(titles, peaks, ends, strict=True)):
        x = left + column * step_x
        _write(picture, title, GAP_PX, x)
        for row in range(len(labels)):
            cells = _colour(maps[row, column] / peak if peak > 0 else torch.zeros(maps.shape[2:]))
            y = top + row * step_y
            picture[y : y + down_px, x : x + across_px] = _enlarge(cells, cell_px)
        bar_px = step_x - GAP_PX
        picture[bar : bar + BAR_PX, x : x + bar_px] = _colour(torch.linspace(0, 1, bar_px))
        _write(picture, "0", bar + BAR_PX + GLYPH_PX, x)
        _write(picture, end, bar + BAR_PX + GLYPH_PX, x + bar_px - _text_px(end))
    _write(picture, note, bar + BAR_PX + GLYPH_PX + LINE_PX, GAP_PX)
    return picture


def encode_png(pixels: Tensor) -> bytes:
    """Encode (height, width, 3) uint8 RGB as a PNG file. Raises ``ResourceError`` if PyAV cannot write PNG."""
    return _encode(pixels, "png", "rgb24")


def encode_jpeg(pixels: Tensor, quality: int = 6) -> bytes:
    """Encode (height, width, 3) uint8 RGB, both sides even, as a JPEG file.

    ``quality``: the quantizer, 2 (best) to 31. Raises ``ResourceError`` if PyAV cannot write JPEG.
    """
    return _encode(pixels, "mjpeg", "yuvj420p", {"qmin": str(quality), "qmax": str(quality)})


def _encode(pixels: Tensor, name: str, pixel_format: str, options: dict[str, str] | None = None) -> bytes:
    try:
        codec: Any = av.CodecContext.create(name, "w")
        codec.height, codec.width = pixels.shape[:2]
        codec.pix_fmt, codec.time_base, codec.options = pixel_format, Fraction(1), options or {}
        frame = av.VideoFrame.from_ndarray(pixels.contiguous().numpy(), format="rgb24")
        if pixel_format != "rgb24":
            frame = frame.reformat(format=pixel_format)
        frame.pts, frame.time_base = 0, codec.time_base
        return b"".join(bytes(packet) for part in (frame, None) for packet in codec.encode(part))
    except (av.FFmpegError, ValueError) as error:
        raise ResourceError(f"{name.upper()}: the picture cannot be encoded: {error}", "run: freres doctor") from error


def draw_heat(values: Tensor, peak: float) -> Tensor:
    """Return values (rows, columns), 0 or more, as a picture with a pixel for each: (rows, columns, 3) uint8 RGB.

    ``peak``: the value that gets the last colour of the scale; those above it get it too.
    """
    return _colour((values / peak).clamp(max=1) if peak > 0 else torch.zeros(values.shape))


def _colour(shares: Tensor) -> Tensor:
    """The colours of values in [0, 1] on the scale: (..., 3) uint8."""
    scale = torch.tensor(SCALE_RGB, dtype=torch.float64)
    at = shares.to(torch.float64) * (len(scale) - 1)
    low = at.floor().long().clamp(max=len(scale) - 2)
    return torch.lerp(scale[low], scale[low + 1], (at - low)[..., None]).round().to(torch.uint8)


def _enlarge(pixels: Tensor, times: int) -> Tensor:
    return pixels.repeat_interleave(times, 0).repeat_interleave(times, 1)


def _text_px(text: str) -> int:
    return len(text) * (GLYPH_COLUMNS + 1) * GLYPH_PX


def _write(picture: Tensor, text: str, y: int, x: int) -> None:
    """Write text into the picture, its upper left corner at (y, x)."""
    for place, character in enumerate(text.upper()):
        first = CHARACTERS.index(character) * GLYPH_ROWS
        rows = [int(digit) for digit in GLYPHS[first : first + GLYPH_ROWS]]
        dots = torch.tensor([[row >> bit & 1 for bit in (2, 1, 0)] for row in rows], dtype=torch.uint8)
        glyph = _enlarge(PAPER - dots * (PAPER - INK), GLYPH_PX)
        left = x + place * (GLYPH_COLUMNS + 1) * GLYPH_PX
        picture[y : y + glyph.shape[0], left : left + glyph.shape[1]] = glyph[..., None]
