"""What compressing a video and asking about it will cost: pure arithmetic on sizes, with every part of the memory shown.

Formulas follow the code that they describe. Letters: n frames of R patches in a batch of the tower, w and I the widths of a
row in the layers and inside their MLPs, b bytes of a number, C channels and S visual tokens, N tokens of a frame, L rows of
the prompt, q rows of a pass of the prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

from freres_cli.backbones.cache import SPARE_PART
from freres_cli.backbones.sizes import DecoderSizes, TowerSizes
from freres_cli.devices import AS_COMPUTED, Storage
from freres_cli.method.adaptive import MOST_STRETCHES
from freres_cli.method.budget import BudgetPlan
from freres_cli.method.compress import MAX_DEMOTED_TRACKS
from freres_cli.method.residuals import MAX_TIME_BINS

FLOAT32 = 4
# GPU memory that a CUDA context and its libraries take before anything is loaded; ours, from the usual 0.4 to 0.6 GiB.
CUDA_CONTEXT_BYTES = 2**29


@dataclass(frozen=True)
class Part:
    """A part of the peak memory. ``formula``: how ``num_bytes`` came about. ``is_on_device``: else in host memory."""

    name: str
    num_bytes: int
    formula: str
    is_on_device: bool = True


def sum_bytes(parts: list[Part], *, is_cuda: bool) -> int:
    """The bytes of the device's memory that these parts take. On the CPU there is one memory for all of them."""
    return sum(part.num_bytes for part in parts if part.is_on_device or not is_cuda)


def encode_parts(
    tower: TowerSizes,
    batch_frames: int,
    frame_px: int,
    frame_tokens: int,
    itemsize: int,
    num_batches: int,
    latent_frames: int,
) -> list[Part]:
    """The memory of decoding and encoding.

    ``tower``: from ``measure_tower``. ``batch_frames``: n. ``frame_px``: pixels of a resized frame. ``frame_tokens``: N.
    ``itemsize``: b. ``num_batches``: whose pixels are there at once. ``latent_frames``: whose latents are.
    """
    n, b, values = batch_frames, itemsize, 3 * frame_px * batch_frames
    rows = n * tower.rows
    # A patch spans two steps in time, so the input is twice the picture.
    packed = values * (2 if tower.is_rotary else 1) * b
    # Of a block: its input, what the attention added, and the normed rows; then three stages of the MLP at once.
    mlp = rows * b * (3 * tower.width + 3 * tower.inner)
    # Or queries, keys and values beside both turned in float32.
    turned = rows * tower.width * (6 * b + 5 * FLOAT32) if tower.is_rotary else 0
    angles = 2 * rows * tower.head_width * FLOAT32 if tower.is_rotary else 0
    normalizing, passing = 13 * values, packed + angles + max(mlp, turned)
    if normalizing > passing:
        what = "13 bytes a value: float64, float32 and 8-bit at once"
    else:
        inside = "3w + 3I" if mlp >= turned else "6w + 20w/b"
        what = f"input of {packed} bytes, rotations of {angles}, n*R*b*({inside})"
    return [
        Part("tower weights", tower.num_parameters * b, f"{tower.num_parameters} parameters * {b} bytes"),
        Part(
            "frames",
            num_batches * values,
            f"{num_batches} batches of {n} frames of {frame_px} pixels in 8-bit RGB",
            is_on_device=False,
        ),
        Part("tower activations", max(normalizing, passing), what),
        Part(
            "latents of batches",
            latent_frames * frame_tokens * tower.out_channels * b,
            f"{latent_frames}*N*C*b: this one, and those that are not reduced yet",
        ),
    ]


def method_parts(
    budget: BudgetPlan | None,
    method: str,
    num_frames: int,
    frame_tokens: int,
    visual: int,
    channels: int,
    itemsize: int,
) -> list[Part]:
    """The memory of what a method keeps until the clip ends, and of its result.

    ``budget``: of Fre-Res, else ``None``. ``method``: its name. ``num_frames``: frames read. ``frame_tokens``: N.
    ``visual``: S. ``channels``: C, with trends if they are kept, without DeepStack rows if they are dropped. ``itemsize``: b.
    """
    row = channels * itemsize
    result = Part("tokens of the bundle", visual * row, "S*C*b", is_on_device=False)
    if budget is not None:
        cells = budget.pooled_grid[0] * budget.pooled_grid[1]
        gops = budget.num_anchors + budget.max_events
        length = min(MAX_TIME_BINS, -(-num_frames // budget.num_anchors))
        kept = gops * frame_tokens * row
        # Where there are more cuts than anchors for them, the strongest keep their coefficients.
        tracks = gops + (min(MAX_DEMOTED_TRACKS, max(0, num_frames - gops)) if budget.max_events else 0)
        candidates = 0 if budget.is_lossless else tracks * (budget.num_coefficients + 3) * cells * channels * FLOAT32
        # The open GoP, the one before it while its anchor may still move, and a stacked copy when one closes.
        trajectory = 0 if budget.is_lossless else 3 * length * cells * channels * FLOAT32
        return [
            Part("anchors", kept, f"{gops} frames * N*C*b", is_on_device=False),
            Part("coefficients", candidates, f"{tracks} GoPs * (K + 3) * {cells} cells * C*4", is_on_device=False),
            Part("open GoP", trajectory, f"3 * {length} time bins * {cells} cells * C*4"),
            result,
        ]
    if method == "adaptive":
        most, latents = 2 * max(MOST_STRETCHES, visual), num_frames * frame_tokens
        # A clip that is merged as a whole keeps every stretch on the way. A large one moves to where there is room for them.
        rows = most if latents > most else latents * (3 if 2 * latents > most else 2)
        return [Part("stretches", rows * row, f"{rows} rows of C*b"), result]
    whole = 2 * num_frames * frame_tokens * row
    return [Part("latents of all frames", whole, "2 copies of T*N*C*b", is_on_device=False), result]


def ask_parts(
    decoder: DecoderSizes,
    visual: int,
    context: int,
    chunk: int,
    itemsize: int,
    storage: Storage = AS_COMPUTED,
    *,
    is_cuda: bool = False,
    mlp_rows: int | None = None,
) -> list[Part]:
    """The memory of prefilling the video and answering.

    ``decoder``: from ``measure_decoder``. ``visual``: S. ``context``: L, rows of the prompt. ``chunk``: q at most.
    ``itemsize``: b. ``storage``: of cache and weights. ``is_cuda``: whether the device is one. ``mlp_rows``: r at most, the
    rows that an MLP takes at a time, if not all.
    """
    b, q = itemsize, min(context, chunk)
    r = q if mlp_rows is None else min(q, mlp_rows)
    row = decoder.width * (1 + decoder.num_deep_layers) * b
    # Of a layer: its input, what the attention added, and the normed rows; then three stages of the MLP at once, and in parts
    # also where their results go.
    mlp = b * ((3 if r == q else 4) * q * decoder.width + 3 * r * decoder.inner)
    # Queries, keys and values, turned; of a later chunk also the two parts of what was read, which a CPU puts together in
    # float32.
    attention = q * b * (2 * decoder.width + (6 if context > chunk else 4) * decoder.heads_width)
    if context > chunk and not is_cuda and b < FLOAT32:
        attention += 2 * q * FLOAT32 * decoder.heads_width
    moving, reading, what = _layer_bytes(decoder, context, b, storage, is_cuda)
    passing = max(mlp, attention) + max(moving, reading)
    weights, held = f"{decoder.num_parameters} parameters * {b} bytes", f"L * {decoder.kv_values} numbers * b"
    if storage.kv is not None:
        held = f"L * ({decoder.kv_values} numbers in {storage.kv} + {decoder.kv_heads} scales * b)"
    if storage.weights is not None:
        weights = (
            f"{decoder.linear_weights} of {decoder.num_parameters} parameters in {storage.weights}, the others * b"
        )
    # On a CPU, spare rows take no memory until they are written.
    rows, states = context + (context // SPARE_PART if is_cuda else 0), decoder.state_values * FLOAT32
    cache = rows * decoder.row_bytes(b, storage)
    held += f", L + L/{SPARE_PART} rows to have some to spare" if is_cuda else ""
    parts = [
        Part("decoder weights", decoder.weight_bytes(b, storage), weights),
        Part("visual tokens", visual * row, "S*C*b", is_on_device=False),
        Part("prompt rows", q * row, "q*C*b: those of one pass"),
        Part("KV cache", cache, held),
        Part("recurrent states", states, "of linear attention, in float32"),
        Part("prefill activations", passing, f"b*(3*q*w + 3*r*I) with r = {r}, and {what}"),
    ]
    if states:
        # A question begins when the prefill's rows and activations are gone.
        copied = max(0, cache + states + reading - q * row - passing)
        told = (
            f"cache and states once more for the question, {cache + states} bytes, beyond the two parts of the prefill"
        )
        parts.append(Part("copy of the cache", copied, told))
    if storage.weights is not None and not is_cuda:
        # They are read as they are stored, and then put into 8 bits one by one.
        before = decoder.num_parameters * b + decoder.largest_linear
        told = f"{decoder.num_parameters} parameters * {b} bytes before they are in 8 bits, beyond the parts above"
        parts.append(Part("weights as they are read", max(0, before - sum_bytes(parts, is_cuda=False)), told))
    return parts


def _layer_bytes(
    decoder: DecoderSizes, context: int, itemsize: int, storage: Storage, is_cuda: bool
) -> tuple[int, int, str]:
    """What a layer takes beside its activations: while its cache moves to where there is room, while attention reads it,
    and both in words."""
    layer = context * decoder.kv_layer_values * itemsize
    read, what = 0, []
    if storage.kv is not None:
        read += layer
        what.append(f"one layer's cache in {itemsize} bytes a number")
    if is_cuda and itemsize == FLOAT32 and decoder.kv_layer_values < 2 * decoder.heads_width:
        # No kernel there takes grouped heads in float32.
        read += 2 * context * decoder.heads_width * FLOAT32
        what.append(f"one layer's keys and values for every head of the queries, 2*L*{decoder.heads_width}*4")
    what = what or ["one layer's cache moved"]
    whole = 0
    if storage.weights is not None:
        whole = decoder.largest_linear * itemsize
        what.append(f"its largest matrix of {decoder.largest_linear} numbers")
    return layer + whole, read + whole, ", and ".join(what)
