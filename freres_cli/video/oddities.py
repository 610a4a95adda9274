"""What the user should know about the frames of a file that are not plain pictures: interlaced, of another size, HDR."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorTrc

from freres_cli.errors import count_of
from freres_cli.records import VideoInfo

HDR_CURVES = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}


def screen_colours(frame: av.VideoFrame) -> dict[str, Any]:
    """Return arguments for ``VideoReformatter.reformat`` that turn HDR, or the wide colours of BT.2020, into BT.709.

    FFmpeg puts HDR's reference white (203 cd/m2, ITU-R BT.2408) at white, and clips what is brighter.
    """
    if int(frame.color_trc) in HDR_CURVES or int(frame.color_primaries) == ColorPrimaries.BT2020:
        return {"dst_color_trc": int(ColorTrc.BT709), "dst_color_primaries": int(ColorPrimaries.BT709)}
    return {}


def is_clear(frame: av.VideoFrame) -> bool:
    """Return whether any pixel of a frame is not opaque."""
    kind = frame.format
    if kind.name != "pal8" and not any(component.is_alpha for component in kind.components):
        return False
    with suppress(FFmpegError):  # whoever converts the picture says so
        return bool((frame.to_ndarray(format="rgba")[..., 3] < 255).any())
    return False


@dataclass
class OddFrames:
    """Counts of the pictures that were looked at. ``coded``: (width, height) of the first frame of the file.

    ``num_interlaced``: pictures of two fields. ``num_resized``: of another size than the first; ``size_px`` is the first
    such size, and ``size_s`` when it was seen. ``num_clear``: pictures that are transparent somewhere. ``curve``: PQ or HLG;
    ``is_wide``: whether colours are those of BT.2020.
    """

    coded: tuple[int, int]
    num_interlaced: int = 0
    num_resized: int = 0
    size_px: tuple[int, int] = (0, 0)
    size_s: float = 0.0
    num_clear: int = 0
    curve: str = ""
    is_wide: bool = False

    @staticmethod
    def of(info: VideoInfo) -> OddFrames:
        """Return no counts yet for a file."""
        return OddFrames((info.coded_width_px, info.coded_height_px))

    def look_at(self, frame: av.VideoFrame, second: float) -> None:
        """Take a picture that is shown from ``second`` on."""
        self.num_interlaced += bool(frame.interlaced_frame)
        size = (frame.width, frame.height)
        if size != self.coded:
            if not self.num_resized:
                self.size_px, self.size_s = size, second
            self.num_resized += 1
        self.num_clear += is_clear(frame)
        self.curve = self.curve or HDR_CURVES.get(int(frame.color_trc), "")
        self.is_wide = self.is_wide or int(frame.color_primaries) == ColorPrimaries.BT2020

    def describe(self) -> Iterator[str]:
        """Yield a note on each oddity."""
        if self.num_interlaced:
            yield (
                f"interlaced, used as stored: moving edges look like combs: {count_of(self.num_interlaced, 'picture')}"
            )
        if self.num_resized:
            (was_w, was_h), (w, h) = self.coded, self.size_px
            yield (
                f"the frame size changes from {was_w}x{was_h}, to {w}x{h} at {self.size_s:.2f} s: all are resized to the "
                f"grid of the first: {count_of(self.num_resized, 'picture')}"
            )
        if self.num_clear:
            yield (
                "transparency is left out, so that the colours beneath show: "
                f"{count_of(self.num_clear, 'picture')} with transparent parts"
            )
        if self.curve:
            yield f"high dynamic range ({self.curve}) converted to BT.709: what is brighter than its reference white is white"
        elif self.is_wide:
            yield "wide colours (BT.2020) converted to BT.709: what that cannot show is clipped"
