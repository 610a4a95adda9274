"""Frames in which nothing moved: they count as the frame before, and pass neither the resize nor the tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import av
import numpy as np

BITS_OF_LEVELS = 8  # bounds are in levels of 8-bit samples, whatever the depth of the file


class StillDetector:
    """Compares each picture with the last one that moved, so slow drift adds up and is seen.

    ``levels``: a picture is still if no sample of any plane differs by more than this, in levels of 255. With 0 it equals
    the other one bit for bit, so nothing changes but the time (ours: players show such frames as one picture).
    """

    def __init__(self, levels: int) -> None:
        self._levels = levels
        self._last: list[np.ndarray] = []

    def is_still(self, planes: Sequence[np.ndarray], bits: int = BITS_OF_LEVELS) -> bool:
        """Return whether a picture is still, else remember it. ``planes``: its samples. ``bits``: those of a sample."""
        bound = self._levels << (bits - BITS_OF_LEVELS) if bits > BITS_OF_LEVELS else self._levels
        same_kind = [(plane.shape, plane.dtype) for plane in planes] == [(p.shape, p.dtype) for p in self._last]
        if same_kind and all(map(lambda a, b: _is_close(a, b, bound), planes, self._last)):
            return True
        self._last = [plane.copy() for plane in planes]
        return False


def describe_still(levels: int, num_pictures: int, num_frames: int) -> Iterator[str]:
    """Yield a note if frames that are not equal to the one before may have been skipped. ``levels``: as above.
    ``num_pictures``: encoded, of ``num_frames``."""
    if levels and num_pictures < num_frames:
        yield f"{num_frames - num_pictures} of {num_frames} frames moved by at most {levels} levels and were not encoded"


def _is_close(a: np.ndarray, b: np.ndarray, bound: int) -> bool:
    if not bound:
        return bool(np.array_equal(a, b))
    # The larger minus the smaller: a difference of unsigned samples would wrap around.
    return bool((np.maximum(a, b) - np.minimum(a, b) <= bound).all())


def _has_whole_samples(kind: av.VideoFormat) -> bool:
    """Whether each sample is a number of its own, of one byte or of two with the lower one first."""
    bits = {component.bits for component in kind.components}
    if bits == {BITS_OF_LEVELS}:
        return not kind.is_bit_stream
    is_apart = kind.is_planar or len(kind.components) == 1
    is_plain = not kind.is_big_endian and not any(name in kind.name for name in ("f16", "f32"))
    return is_apart and is_plain and all(BITS_OF_LEVELS < count <= 16 for count in bits)


def read_planes(frame: av.VideoFrame, levels: int = 0) -> tuple[list[np.ndarray], int]:
    """Return the visible samples of each plane of a frame as views, (rows, samples), and the bits of a sample.

    ``levels``: up to which they will be compared. Above 0, formats of which the bytes are no samples are made RGB first.
    """
    # A palette is no plane of samples, and bottom-up rows lie before their start.
    is_odd = frame.format.name == "pal8" or any(plane.line_size <= 0 for plane in frame.planes)
    if is_odd or (levels and not _has_whole_samples(frame.format)):
        frame = frame.reformat(format="rgb24")
    components = frame.format.components
    bits = max(component.bits for component in components)
    dtype = np.dtype(np.uint8 if bits <= BITS_OF_LEVELS else "<u2")
    planes = []
    for index, plane in enumerate(frame.planes):
        # Rows are padded; what the padding holds means nothing.
        num_bytes = plane.width * sum((c.bits + 7) // 8 for c in components if c.plane == index)
        if len(frame.planes) == 1:
            num_bytes = -(-plane.width * frame.format.padded_bits_per_pixel // 8)
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height]
        planes.append(rows[:, : min(num_bytes, plane.line_size)].view(dtype))
    return planes, bits
