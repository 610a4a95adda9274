"""The bundled model's language half, trained on questions about made clips, on top of its frozen tower."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn

from freres_cli.workflows.ask import format_choices
from freres_cli.workflows.muon import Muon
from freres_cli.workflows.train_tower import run_tower
from freres_cli.world.draw import draw_scenes
from freres_cli.world.labels import dense_labels
from freres_cli.world.questions import Question, questions_of
from freres_cli.world.scene import COLOURS, SHAPES
from freres_cli.world.script import make_scene

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
QUESTIONS_A_CLIP = 10
SAME_CATEGORY = 2  # questions of one category a clip, so that rare ones count
LETTERS = "ABCD"
END_WEIGHT = 0.1  # of the end-of-turn token in the loss: it is nearly always right


@dataclass
class EncodedClip:
    """``latents``: (T, cells, D) float16. ``present``: (T, cells) whether an object is there."""

    seed: int
    latents: Tensor
    present: Tensor
    grid: int
    questions: list[Question]


@dataclass
class View:
    """The tokens of a clip that one training example sees: (S, D), (S, 3), and the clip's number of frames."""

    latents: Tensor
    positions: Tensor
    num_frames: int


@torch.no_grad()
def encode_clips(tower: Any, seeds: Sequence[int], grid: int, noise_seed: int | None = None) -> list[EncodedClip]:
    scenes = [make_scene(seed) for seed in seeds]
    clips = []
    generator = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
    for seed, scene, frames in zip(seeds, scenes, draw_scenes(scenes), strict=True):
        pixels = frames.float()
        if generator is not None:
            level = 3 * torch.rand(1, generator=generator)
            pixels = (pixels + torch.randn(pixels.shape, generator=generator) * level).clamp(0, 255)
        latents = run_tower(tower, pixels).flatten(1, 2).half()
        present = dense_labels(scene, grid)["present"].flatten(1)
        clips.append(EncodedClip(seed, latents, present, grid, questions_of(seed, scene)))
    return clips


# How a training example thins its clip, and how many clips of each make a batch.
VIEWS = {"all": 6, "random": 10, "objects": 16, "frames": 10, "merged": 10, "pooled": 16}
BRIEF = ("moment", "instant", "briefly", "white")  # questions whose evidence may lie in the frames left out


def make_view(clip: EncodedClip, name: str, rng: Generator) -> View:
    """Tokens of a clip as some compression might leave them; positions of merged tokens are those of their centres."""
    t, cells, width = clip.latents.shape
    latents = clip.latents.float()
    frame, cell = torch.meshgrid(torch.arange(t), torch.arange(cells), indexing="ij")
    positions = torch.stack([frame, cell // clip.grid, cell % clip.grid], -1).float()
    if name == "merged":
        even = t - t % 2
        latents = latents[:even].view(-1, 2, cells, width).mean(1)
        positions = positions[:even].view(-1, 2, cells, 3).mean(1)
    elif name == "pooled":
        latents, positions = (_pool(x, clip.grid) for x in (latents, positions))
    keep = torch.ones(latents.shape[:2], dtype=torch.bool)
    if name == "random":
        keep = torch.from_numpy(rng.random(keep.shape) < rng.uniform(0.2, 0.7))
    elif name == "objects":
        # Most compression keeps what stands out.
        keep = clip.present & torch.from_numpy(rng.random(keep.shape) < rng.uniform(0.6, 1.0))
        keep |= torch.from_numpy(rng.random(keep.shape) < rng.uniform(0.03, 0.12))
    elif name == "frames":
        keep &= torch.from_numpy(rng.random(t) < rng.uniform(0.3, 0.6))[:, None]
        keep[int(rng.integers(t))] = True
    return View(latents[keep], positions[keep], t)


def _pool(x: Tensor, grid: int) -> Tensor:
    """(T, grid*grid, C) -> means of blocks of 2x2."""
    t, _, channels = x.shape
    half = grid // 2
    return x.view(t, half, 2, half, 2, channels).mean((2, 4)).flatten(1, 2)


class Prompts:
    """Token ids of questions and answers, cached by text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self.prefix = self.ids(SYSTEM)
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            if len(self._ids) > 200_000:
                self._ids.clear()
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def question(self, text: str) -> list[int]:
        return self.ids(f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n")


@dataclass
class Item:
    """One question as trained: ``answer`` is a letter or a text; ``category`` for the running scores."""

    prompt: list[int]
    answer: list[int]
    category: str


def choose_questions(clip: EncodedClip, view: str, rng: Generator, prompts: Prompts, copy_tasks: int) -> list[Item]:
    by_category: dict[str, int] = defaultdict(int)
    items = []
    for index in rng.permutation(len(clip.questions)):
        question = clip.questions[index]
        if by_category[question.category] == SAME_CATEGORY or len(items) == QUESTIONS_A_CLIP:
            continue
        if view == "frames" and any(word in question.question for word in BRIEF):
            continue
        by_category[question.category] += 1
        items.append(as_item(question, prompts, bool(rng.random() < 0.6)))
    return items + [_copy_task(rng, prompts) for _ in range(copy_tasks)]


def as_item(question: Question, prompts: Prompts, with_options: bool) -> Item:
    if with_options:
        letter = LETTERS[question.choices.index(question.answer)]
        text = format_choices(question.question, question.choices)
        return Item(prompts.question(text), prompts.ids(letter), question.category)
    return Item(prompts.question(question.question), prompts.ids(question.answer), f"{question.category}*")


def _copy_task(rng: Generator, prompts: Prompts) -> Item:
    """Name an option's letter: what every multiple-choice answer ends with, without anything to see."""
    pairs = [f"{COLOURS[rng.integers(6)]} {SHAPES[rng.integers(6)]}" for _ in range(8)]
    pool = (list(COLOURS), list(SHAPES), ["up", "down", "left", "right"], ["1", "2", "3", "4"], list(dict.fromkeys(pairs)))
    options = pool[rng.integers(len(pool))]
    chosen = [options[i] for i in rng.permutation(len(options))[:4]]
    index = int(rng.integers(len(chosen)))
    text = format_choices(f"Say {chosen[index]}.", chosen)
    return Item(prompts.question(text), prompts.ids(LETTERS[index]), "copy")


@dataclass
class Pack:
    """A batch: embeddings are made from ``ids`` and ``latents``; ``rows``/``targets`` say what is learnt."""

    ids: Tensor
    is_video: Tensor
    latents: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor
    firsts: list[tuple[int, int, str, int]] = field(default_factory=list)


def pack(views: Sequence[View], items: Sequence[Sequence[Item]], prompts: Prompts, grid: int) -> Pack:
    """Several questions behind one video prefix; none sees another."""
    p = len(prompts.prefix)
    rows = [_pack_one(view, part, prompts, grid) for view, part in zip(views, items, strict=True)]
    longest = max(len(row[0]) for row in rows)
    batch = len(rows)
    ids = torch.zeros(batch, longest, dtype=torch.long)
    segments = torch.full((batch, longest), -1)
    targets = torch.full((batch, longest), -100)
    weights = torch.zeros(batch, longest)
    positions = torch.zeros(3, batch, longest)
    is_video = torch.zeros(batch, longest, dtype=torch.bool)
    firsts: list[tuple[int, int, str, int]] = []
    for b, (row_ids, row_segments, row_targets, row_weights, row_positions, first) in enumerate(rows):
        n = len(row_ids)
        ids[b, :n] = torch.tensor(row_ids)
        segments[b, :n] = torch.tensor(row_segments)
        targets[b, :n] = torch.tensor(row_targets)
        weights[b, :n] = torch.tensor(row_weights)
        positions[:, b, :n] = row_positions
        is_video[b, p : p + len(views[b].latents)] = True
        firsts += [(b, where, name, target) for where, name, target in first]
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    allowed = causal & (same | (segments == 0)[:, None, :])
    allowed |= torch.eye(longest, dtype=torch.bool)
    mask = torch.zeros(batch, 1, longest, longest).masked_fill_(~allowed[:, None], -1e9)
    latents = torch.cat([view.latents for view in views])
    return Pack(ids, is_video, latents, positions, mask, targets, weights, firsts)


def _pack_one(view: View, items: Sequence[Item], prompts: Prompts, grid: int) -> tuple[Any, ...]:
    p, s = len(prompts.prefix), len(view.latents)
    ids = [*prompts.prefix, *[0] * s]
    segments, targets, weights = [0] * (p + s), [-100] * (p + s), [0.0] * (p + s)
    text = torch.arange(p).float().expand(3, -1)
    places = [text, view.positions.T + p]
    start = p + max(view.num_frames, grid)
    first = []
    for number, item in enumerate(items, 1):
        whole = [*item.prompt, *item.answer, prompts.end]
        where = len(ids) + len(item.prompt) - 1
        first.append((where, item.category, item.answer[0]))
        after = [*item.answer, prompts.end, -100]
        ids += whole
        segments += [number] * len(whole)
        targets += [-100] * (len(item.prompt) - 1) + after
        weights += [0.0] * (len(item.prompt) - 1) + [1.0] * len(item.answer) + [END_WEIGHT, 0.0]
        places.append((torch.arange(len(whole)).float() + start).expand(3, -1))
    return ids, segments, targets, weights, torch.cat(places, -1), first


def run_pack(decoder: Any, batch: Pack) -> Tensor:
    """Logits of the rows that have a target, (n, vocabulary)."""
    embeds = decoder.embed_tokens(batch.ids)
    embeds = embeds.masked_scatter(batch.is_video[..., None], batch.latents)
    plain = torch.arange(batch.ids.shape[1]).expand(1, *batch.ids.shape)
    out = decoder(
        inputs_embeds=embeds,
        attention_mask=batch.mask,
        position_ids=torch.cat([plain.float(), batch.positions]),
        use_cache=False,
    )
    return F.linear(out.last_hidden_state[batch.targets >= 0], decoder.embed_tokens.weight)


def pack_loss(logits: Tensor, batch: Pack) -> tuple[Tensor, list[tuple[str, bool]]]:
    known = batch.targets >= 0
    losses = F.cross_entropy(logits, batch.targets[known], reduction="none")
    weights = batch.weights[known]
    row_of = torch.full(batch.targets.shape, -1)
    row_of[known] = torch.arange(int(known.sum()))
    best = logits.argmax(-1)
    right = [(name, bool(best[row_of[b, where]] == target)) for b, where, name, target in batch.firsts]
    return (losses * weights).sum() / weights.sum(), right


class ClipBuffer:
    """The newest encoded clips; each is seen a few times under different views."""

    def __init__(self, tower: Any, grid: int, capacity: int, first_seed: int) -> None:
        self.tower, self.grid, self.next_seed = tower, grid, first_seed
        self.clips: deque[EncodedClip] = deque(maxlen=capacity)

    def add(self, count: int) -> None:
        seeds = range(self.next_seed, self.next_seed + count)
        self.clips.extend(encode_clips(self.tower, seeds, self.grid, noise_seed=self.next_seed))
        self.next_seed += count

    def draw(self, count: int, rng: Generator) -> list[EncodedClip]:
        return [self.clips[i] for i in rng.choice(len(self.clips), count, replace=False)]


def view_shares(progress: float) -> tuple[float, ...]:
    """How often each view is drawn: short ones first, whole clips more and more."""
    if progress < 0.45:
        return (0.0, 0.0, 0.75, 0.1, 0.0, 0.15)
    if progress < 0.8:
        return (0.08, 0.15, 0.45, 0.12, 0.1, 0.1)
    return (0.35, 0.15, 0.25, 0.1, 0.1, 0.05)


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, constant, then linear to zero over the last third."""
    return min(1.0, (step + 1) / 60, (num_steps - step) / (num_steps / 3))


def train_language(
    decoder: Any,
    tower: Any,
    tokenizer: Any,
    grid: int,
    num_steps: int,
    out: Path,
    *,
    new_clips: int = 5,
    lr: float = 2e-3,
    capacity: int = 1600,
    log: Callable[[str], None] = print,
) -> None:
    prompts = Prompts(tokenizer)
    matrices = [p for n, p in decoder.named_parameters() if p.ndim == 2 and "layers" in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in decoder.parameters() if id(p) not in chosen]
    optimizers = [Muon(matrices, 3 * lr), torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))]
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    step, first_seed = 0, 10**7
    if out.exists():
        state = torch.load(out)
        decoder.load_state_dict(state["decoder"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, first_seed = state["step"], max(10**7, state["next_seed"] - 800)
        log(f"resumed at step {step}")
    buffer = ClipBuffer(tower, grid, capacity, first_seed)
    while len(buffer.clips) < 240 or (step and len(buffer.clips) < 800):
        buffer.add(20)
    scores: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=200))
    start = time.time()
    losses: deque[float] = deque(maxlen=50)
    while step < num_steps:
        rng = np.random.default_rng([step, 3])
        progress = step / num_steps
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(step, num_steps)
        buffer.add(new_clips)
        view = list(VIEWS)[rng.choice(len(VIEWS), p=view_shares(progress))]
        clips = buffer.draw(VIEWS[view], rng)
        views = [make_view(clip, view, rng) for clip in clips]
        copies = 2 if progress < 0.25 else 0
        items = [choose_questions(clip, view, rng, prompts, copies) for clip in clips]
        packed = pack(views, items, prompts, grid)
        loss, right = pack_loss(run_pack(decoder, packed), packed)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        for name, is_right in right:
            scores[name].append(is_right)
        step += 1
        if step % 20 == 0:
            told = " ".join(f"{k[:6]}{'*' if k.endswith('*') else ''} {np.mean(v):.2f}" for k, v in sorted(scores.items()))
            log(f"{time.time() - start:6.0f}s step {step} {view} {packed.ids.shape[1]} loss {np.mean(losses):.3f} {told}")
        if step % 100 == 0 or step == num_steps:
            save = {"decoder": decoder.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            partial = out.with_suffix(".part")
            torch.save({**save, "step": step, "next_seed": buffer.next_seed}, partial)
            partial.replace(out)
