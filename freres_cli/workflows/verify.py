"""Check on a user's own checkpoint and device that freres computes what transformers computes.

The stock model runs first, and is freed before ours is loaded, so that one copy of the weights is in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from freres_cli.backbones import engine
from freres_cli.backbones.base import LanguageModel, PromptRows
from freres_cli.backbones.generation import generate
from freres_cli.backbones.stock import StockClip, StockPath, load_stock_model
from freres_cli.backbones.stock_processors import (
    prompt_note,
    read_stock_settings,
    stock_pixels,
    stock_prompt_ids,
)
from freres_cli.baselines.full import gather_tokens
from freres_cli.devices import memory_errors_as
from freres_cli.errors import BackboneError
from freres_cli.pipeline.models import Models
from freres_cli.records import FrameSize, VideoTokens

NUM_FRAMES, PERIOD_S, GRID = 4, 2.5, (4, 5)
NUM_ANSWER, NUM_STEPS = 16, 4
QUESTION = "What moves in this video, and where does it go?"
# The stock model's own positions after a video, so that both say the same; freres ask has the rule of training.
TEXT_AFTER = "hf"

# Largest difference that is rounding, as a share of the largest stock value. Sums in another order round differently once
# in every layer. In float32 that came to 1.4e-6 at most; wrong positions or weights are off by more than 1e-3. A bfloat16
# has 8 significant bits, so one rounding is 1/256; prefills in other chunks were off by 1/36, and wrong positions by 1/7
# and more. A float16 has 11 bits.
TOLERANCES = {torch.float32: 2.0**-15, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}


@dataclass(frozen=True)
class Law:
    """One comparison. ``state``: ``holds``, ``fails`` or ``not run``.

    ``what``: the two sides. ``difference``: the largest, ``None`` if not run. ``tolerance``: the largest that is allowed.
    ``reason``: why it was not run or cannot hold, or anything else that a reader should know.
    """

    name: str
    what: str
    state: str
    difference: float | None = None
    tolerance: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Verification:
    """All laws of one model, and what they were tried with. ``grid``: (T, H, W). ``num_tokens``: of the prompt."""

    laws: tuple[Law, ...]
    family: str
    model: dict[str, str | None]
    dtype: torch.dtype
    grid: tuple[int, int, int]
    num_tokens: int | None

    @property
    def failed(self) -> list[str]:
        """Names of the laws that do not hold."""
        return [law.name for law in self.laws if law.state == "fails"]


LAWS = {
    "pixels": "input of the tower: ours, the family's image processor",
    "latents": "visual tokens of each frame: ours, the stock features",
    "prompt": "token ids of the prompt: ours, the family's processor",
    "logits": "every token kept, every row: ours, the stock forward pass",
    "answer": f"every token kept, {NUM_ANSWER} greedy ids: ours, the stock generate",
    "subset": f"some tokens kept, {NUM_STEPS} steps: ours, the stock model with the others masked",
}
NO_SUBSET = "this family's linear attention has a state: to leave tokens out is not to mask them"


@dataclass(frozen=True)
class StockResult:
    """What the stock model makes of the clip, on the CPU. Without ``ids`` the decoder did not run."""

    pixels: Tensor
    features: Tensor
    ids: tuple[int, ...] | None
    embeds: Tensor | None = None
    is_text: Tensor | None = None
    logits: Tensor | None = None
    answer: tuple[list[int], Tensor] | None = None
    steps: tuple[list[int], Tensor] | None = None
    reason: str | None = None


def verify_model(models: Models, on_step: Callable[[str], None] | None = None) -> Verification:
    """Try every law on a clip of 4 small frames that is drawn here.

    ``models``: the model and where it runs, not loaded yet. ``on_step``: told what is done next. Raises ``BackboneError`` if
    either side cannot load the model, ``ResourceError`` if memory runs out.
    """
    tell = on_step or (lambda text: None)
    sizes = models.weightless_encoder
    size = sizes.frame_size(GRID[1] * 28, GRID[0] * 28, GRID)
    frames = draw_frames(size)
    keep = choose_subset(size.num_tokens)
    # CUDA's convolutions are in TF32 by default, which has 11 bits where the tolerance of float32 needs 16.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, memory_errors_as("verify", "use a smaller model or dtype, or a device with more memory"):
        tell("running the stock model")
        stock = run_stock(models, frames, size, keep)
        tell("running freres")
        laws = [*compare_vision(models, frames, stock), *compare_language(models, frames, stock, keep)]
    encoder = models.encoder
    num_tokens = None if stock.ids is None else len(stock.ids)
    grid = (NUM_FRAMES, size.grid_h, size.grid_w)
    return Verification(tuple(laws), encoder.family, encoder.fingerprint, encoder.dtype, grid, num_tokens)


def draw_frames(size: FrameSize, num_frames: int = NUM_FRAMES) -> Tensor:
    """(n, h, w, 3) uint8: a square that moves over a gradient with some noise, so that no two tokens are alike."""
    generator = torch.Generator().manual_seed(0)
    height, width = size.height_px, size.width_px
    ramp = torch.linspace(20, 180, height)[:, None] + torch.linspace(0, 40, width)
    noise = torch.rand(num_frames, height, width, 3, generator=generator) * 30
    frames = ramp[None, ..., None] + noise
    side = max(1, min(height, width) // 4)
    for frame in range(num_frames):
        left = (width - side) * frame // max(1, num_frames - 1)
        frames[frame, side : 2 * side, left : left + side] = torch.tensor([250.0, 40.0, 90.0])
    return frames.round().to(torch.uint8)


def choose_subset(num_cells: int) -> Tensor:
    """Some of the tokens of 4 frames: few of the first, none of the second, and the last one."""
    first = {0, 3 % num_cells, 7 % num_cells, num_cells - 1}
    later = {2 * num_cells + 1 % num_cells, 2 * num_cells + 2 % num_cells, 3 * num_cells, 4 * num_cells - 1}
    return torch.tensor(sorted(first | later))


@torch.no_grad()
def run_stock(models: Models, frames: Tensor, size: FrameSize, keep: Tensor) -> StockResult:
    """Run the stock model, with inputs from the stock processors, and free it.

    ``models``: which model. ``frames``: (n, h, w, 3) uint8, of ``size``. ``keep``: the tokens of the law ``subset``.
    """
    sizes: Any = models.weightless_encoder
    checkpoint, family = models.checkpoint, models.checkpoint.model_type
    patch_px, side_patches = getattr(sizes, "patch_px", 0), getattr(sizes, "merge", 1)
    rule = sizes.default_rule.fill(read_stock_settings(checkpoint))
    pixels = stock_pixels(family, frames, rule, patch_px, side_patches)
    counter: Any = models.prompt_counter
    grid, reason, ids = (len(frames), size.grid_h, size.grid_w), None, None
    try:
        ids = tuple(stock_prompt_ids(checkpoint, counter.config, counter.tokenizer, grid, PERIOD_S, QUESTION))
    except BackboneError as error:
        reason = error.message
    stock = load_stock_model(checkpoint, models.source.device, models.identify_encoder().dtype)
    path = StockPath(stock, StockClip(family, ids or (), pixels, grid, side_patches, PERIOD_S))
    features = path.features().float().cpu()
    if ids is None:
        return StockResult(pixels, features, None, reason=reason)
    answer, scores = path.answer(NUM_ANSWER, counter.stop_ids)
    steps = None
    if is_croppable(counter):
        told, logits = path.masked_steps(keep, NUM_STEPS)
        steps = told, logits.cpu()
    embeds = stock.get_input_embeddings()(path.ids[0]).float().cpu()
    is_text = (path.ids[0] != path.pad).cpu()
    result = StockResult(pixels, features, ids, embeds, is_text, path.logits().cpu(), (answer, scores.cpu()), steps)
    del path, stock
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def is_croppable(model: Any) -> bool:
    """Whether tokens can be left out of a prompt exactly: no layer keeps a recurrent state."""
    return bool(getattr(model.new_cache(), "is_croppable", True))


def compare_vision(models: Models, frames: Tensor, stock: StockResult) -> list[Law]:
    """The laws of the vision half, which is loaded here."""
    encoder: Any = models.encoder
    prepare = getattr(encoder, "patches", None) or encoder.prepare
    ours = prepare(frames).float().cpu()
    pixels = judge("pixels", largest(ours, stock.pixels.reshape(ours.shape)), 0.0)
    if encoder.device.type != "cpu":
        # Divisions on another device may round the other way once.
        pixels = judge("pixels", pixels.difference or 0.0, 2.0**-20 * float(stock.pixels.abs().max()))
    latents = encoder.encode(frames).float().cpu().flatten(0, 2)
    scale = float(stock.features.abs().max())
    return [pixels, judge("latents", largest(latents, stock.features), TOLERANCES[encoder.dtype] * scale)]


@torch.no_grad()
def compare_language(models: Models, frames: Tensor, stock: StockResult, keep: Tensor) -> list[Law]:
    """The laws of the language half, which is loaded here.

    ``models``, ``frames``, ``keep``: as ``run_stock`` takes them. ``stock``: what that gave.
    """
    names = ("prompt", "logits", "answer", "subset")
    if stock.ids is None:
        return [not_run(name, stock.reason or "") for name in names]
    model = models.language_model
    latents = models.encoder.encode(frames)
    seconds = torch.arange(len(frames), dtype=torch.float64) * PERIOD_S
    everything = gather_tokens(latents, seconds, torch.arange(latents.shape[:3].numel()), models.encoder.width)
    prompt = model.prompt(QUESTION)
    rows = whole_prompt(model, prompt.prefix, everything, prompt.suffix)
    if len(rows) != len(stock.ids):
        text = f"ours has {len(rows)} tokens, the stock prompt {len(stock.ids)}"
        failed = Law("prompt", LAWS["prompt"], "fails", float(abs(len(rows) - len(stock.ids))), 0.0, text)
        return [failed, *(not_run(name, "the prompts differ") for name in names[1:])]
    assert stock.embeds is not None and stock.is_text is not None and stock.logits is not None and stock.answer
    ours = rows.embeds[:, : model.width].float().cpu()
    wrong = (ours != stock.embeds).any(-1) & stock.is_text
    tolerance = TOLERANCES[model.dtype] * float(stock.logits.abs().max())
    laws = [judge("prompt", float(wrong.sum()), 0.0, prompt_note(model.family))]
    laws.append(judge("logits", compare_rows(model, rows, stock.logits), tolerance))
    answer = generate(
        model, engine.prefill_video(model, prompt.prefix, everything, TEXT_AFTER), prompt.suffix, NUM_ANSWER
    )
    list(answer)
    laws.append(judge_answer(answer.ids, *stock.answer, tolerance))
    if stock.steps is None:
        return [*laws, not_run("subset", NO_SUBSET)]
    told, expected = stock.steps
    some = gather_tokens(latents, seconds, keep, models.encoder.width)
    steps = run_steps(model, whole_prompt(model, prompt.prefix, some, prompt.suffix), told[:-1]).cpu()
    return [*laws, judge("subset", largest(steps, expected), tolerance)]


def whole_prompt(
    model: LanguageModel, prefix: tuple[int, ...], video: VideoTokens, suffix: tuple[int, ...]
) -> PromptRows:
    """The rows of a whole prompt, from the ids before the video, ``prefix``, and those after it, ``suffix``.

    ``model``: the language half. ``video``: its tokens.
    """
    rows = model.splice(prefix, video, TEXT_AFTER)
    return rows.then(model.text_rows(suffix, len(rows), rows.next_position))


def compare_rows(model: LanguageModel, rows: PromptRows, expected: Tensor) -> float:
    """The largest difference of the logits of every row, in one pass. ``expected``: (L, vocabulary)."""
    hidden = model.decode(rows, model.new_cache())
    return largest(model.logits(hidden).cpu(), expected)


def judge_answer(ours: list[int], told: list[int], scores: Tensor, tolerance: float) -> Law:
    """The law of greedy ids. They may part where the stock model itself has a tie within ``tolerance``.

    ``ours``, ``told``: the ids of both. ``scores``: (n, vocabulary), the logits that the stock model picked ``told`` from.
    """
    parts_at = next((n for n, (a, b) in enumerate(zip(ours, told, strict=False)) if a != b), None)
    if parts_at is not None:
        gap = float(scores[parts_at, told[parts_at]] - scores[parts_at, ours[parts_at]])
        text = f"the ids part at token {parts_at + 1}, where the two have logits {gap:.3g} apart in the stock model"
        return judge("answer", gap, tolerance, text)
    if len(ours) != len(told):
        text = f"ours stops after {len(ours)} tokens, the stock answer after {len(told)}"
        return Law("answer", LAWS["answer"], "fails", None, tolerance, text)
    return judge("answer", 0.0, tolerance)


def run_steps(model: LanguageModel, rows: PromptRows, ids: list[int]) -> Tensor:
    """Logits after the prompt and after each further token of ``ids``: (1 + n, vocabulary)."""
    cache = model.new_cache()
    logits = []
    for token in [*ids, None]:
        logits.append(model.logits(engine.prefill(model, rows, cache))[0])
        if token is not None:
            rows = model.text_rows([token], cache.get_seq_length(), rows.next_position)
    return torch.stack(logits)


def largest(ours: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite if the shapes differ or a value is not a number."""
    if ours.shape != expected.shape:
        return float("inf")
    # A row at a time: logits of a long prompt are large.
    found = [float((a.float() - b.float()).abs().max()) for a, b in zip(ours, expected, strict=True)]
    return max((value if value == value else float("inf")) for value in found)


def judge(name: str, difference: float, tolerance: float, reason: str | None = None) -> Law:
    """The law ``name``: ``difference`` is at most ``tolerance``. ``reason``: what else a reader should know."""
    state = "holds" if difference <= tolerance else "fails"
    return Law(name, LAWS[name], state, difference, tolerance, reason)


def not_run(name: str, reason: str) -> Law:
    """A law that cannot be tried on this model."""
    return Law(name, LAWS[name], "not run", reason=reason)
