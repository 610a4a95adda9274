"""The bundled model's language half, trained on questions about generated clips, on top of its frozen tower."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn

from freres_cli.training.muon import Muon
from freres_cli.training.precision import mixed_precision
from freres_cli.training.state import put_back, read_state, save_state
from freres_cli.world.draw import draw_scenes
from freres_cli.world.labels import ALWAYS_KNOWN, TRACES, trace_labels
from freres_cli.world.packing import Item, Pack, View, pack, pack_loss, run_pack, use_packed_attention
from freres_cli.world.questions import Question, questions_of
from freres_cli.world.scene import Scene
from freres_cli.world.script import make_scene
from freres_cli.world.train_tower import run_tower

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
FIRST_SEED = 10**7
LEARNING_RATE = 2e-3
MUON_FACTOR = 1
WARM_UP_STEPS = 60
NEW_CLIPS = 2  # per step
CAPACITY = 1600  # clips in memory; each is seen a few times, in different views
LEVELS_SHOWN = (3, 1, 3, 2, 3, 1, 3, 3, 1)
LONGEST_CLIP = 420  # frames
MOST_FRAMES = 110  # of a clip that are encoded
LONGEST_TIMED = 48  # frames; in longer clips frame numbers are too large to learn
MOST_TOKENS = 3000  # of a clip in a batch
MOST_CLIPS, BATCH_TOKENS = 16, 6000  # of a batch
STRETCH_TOKENS = (60, 500)  # roughly this many per clip in the views that are cut where something changes
NOISE = 3.0  # grey levels
LOG_EVERY, SAVE_EVERY = 20, 50
# Motion is the hardest to learn, then flashes, touches, cuts and their order.
KINDS_SHOWN = ("motion", "cut", "repeat", "hit", "order", "motion", "cut", "order", "hit", "repeat")
OBJECT_TOKENS = (130, 240)  # roughly this many per clip in the view of objects
SAME_CATEGORY = 4  # most questions of one category per clip, so that rare categories count
SCORED = 200  # a running score is over this many answers
KNOWN = 0.9  # a category that is right this often is asked once per clip
FIRST_CLIPS = 320
TRACED = {0: 5, 3: len(TRACES)}  # layer: how many of the traces are read after it
TRACE_WEIGHT = 3.0
MOTION_WEIGHT = 4.0  # of the traces of motion against the others: most objects stand still
END_WEIGHT = 0.1  # of the end-of-turn token in the loss; it is nearly always right


@dataclass
class EncodedClip:
    """A clip in main memory: n of its frames. ``level``: its difficulty. ``frames``: (n,), which frames, increasing.
    ``latents``: (n, cells, D) float16. ``present``: (n, cells), whether there is an object. ``brief``: (n, cells), whether
    there is one that is visible or white only for a moment. ``traces``: (n, cells, 13), ``labels.TRACES``, NaN where
    unknown."""

    seed: int
    level: int
    frames: Tensor
    latents: Tensor
    present: Tensor
    brief: Tensor
    traces: Tensor
    grid: int
    questions: list[Question]


def level_of(seed: int) -> int:
    """Return the level that a training seed's clip has."""
    return LEVELS_SHOWN[seed // len(KINDS_SHOWN) % len(LEVELS_SHOWN)]


def make_training_scene(seed: int) -> Scene | None:
    """Return the scene of a training seed, ``None`` if it is too long to train on."""
    scene = make_scene(seed, KINDS_SHOWN[seed % len(KINDS_SHOWN)], level_of(seed))
    return scene if scene.num_frames <= LONGEST_CLIP else None


def choose_frames(scene: Scene) -> Tensor:
    """Return the frames that are encoded: evenly spread ones, at most about ``MOST_FRAMES``, and all those in which
    something is visible or white only for a moment."""
    keep = np.zeros(scene.num_frames, bool)
    keep[:: -(-scene.num_frames // MOST_FRAMES)] = True
    for thing in scene.things:
        keep |= thing.visible if thing.is_outlined else thing.is_white
    return torch.from_numpy(keep.nonzero()[0])


@torch.no_grad()
def encode_clip(tower: Any, seed: int, scene: Scene, grid: int, device: torch.device) -> EncodedClip:
    """Return the clip of a ``seed``, drawn and encoded, with about as much noise as a video encoder leaves.

    ``tower``: the vision tower, on ``device``. ``scene``: the seed's. ``grid``: tokens per side of a frame.
    """
    level, chosen = level_of(seed), choose_frames(scene)
    frames = draw_scenes([scene], device=device)[0][chosen]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames.shape, generator=generator) * NOISE * torch.rand(1, generator=generator)
    with mixed_precision(device):
        latents = run_tower(tower, (frames.float() + noise.to(device)).clamp(0, 255)).flatten(1, 2).half().cpu()
    traces, present, brief = (part.flatten(1, 2)[chosen] for part in trace_labels(scene, grid))
    traces[..., ALWAYS_KNOWN:][~present] = torch.nan
    if scene.num_frames > LONGEST_TIMED:
        traces[..., [TRACES.index("frame"), TRACES.index("first")]] = torch.nan
    return EncodedClip(seed, level, chosen, latents, present, brief, traces, grid, questions_of(seed, scene))


# How a training example thins its clip. Each method that freres compares has its like here.
VIEWS = ("all", "random", "objects", "frames", "merged", "pooled", "stretches", "changed")
BRIEF = ("moment", "instant", "briefly", "white")  # questions whose evidence may be in the frames left out


def make_view(clip: EncodedClip, name: str, rng: Generator) -> View:
    """Return the tokens of a clip as some compression might leave them. Merged tokens are placed at their centres."""
    n, cells, width = clip.latents.shape
    latents = clip.latents.float()
    frame, cell = torch.meshgrid(clip.frames, torch.arange(cells), indexing="ij")
    positions = torch.stack([frame, cell // clip.grid, cell % clip.grid], -1).float()
    traces = clip.traces
    if name == "merged":
        even = n - n % 2
        latents = latents[:even].view(-1, 2, cells, width).mean(1)
        positions = positions[:even].view(-1, 2, cells, 3).mean(1)
        traces = torch.full((*positions.shape[:2], len(TRACES)), torch.nan)
    elif name == "pooled":
        latents, positions = (_pool(x, clip.grid) for x in (latents, positions))
        traces = torch.full((*positions.shape[:2], len(TRACES)), torch.nan)
    keep = torch.ones(latents.shape[:2], dtype=torch.bool)
    if name == "random":
        keep = torch.from_numpy(rng.random(keep.shape) < rng.uniform(0.2, 0.7))
    elif name == "objects":
        # Most compression methods keep what stands out.
        share = rng.uniform(*OBJECT_TOKENS) / max(1, int(clip.present.sum()))
        keep = clip.present & torch.from_numpy(rng.random(keep.shape) < share)
        keep |= clip.brief
        keep |= torch.from_numpy(rng.random(keep.shape) < rng.uniform(0.01, 0.04))
    elif name == "frames":
        keep &= torch.from_numpy(rng.random(n) < rng.uniform(0.2, 0.6) * min(1.0, 40 / n))[:, None]
        keep[int(rng.integers(n))] = True
    elif name in ("stretches", "changed"):
        return _cut_where_it_changes(latents, positions, traces, name == "stretches", rng)
    kept = keep.flatten().nonzero().squeeze(1)
    if len(kept) > MOST_TOKENS:
        kept = kept[torch.from_numpy(np.sort(rng.permutation(len(kept))[:MOST_TOKENS]))]
    return View(latents.flatten(0, 1)[kept], positions.flatten(0, 1)[kept], traces.flatten(0, 1)[kept])


def _cut_where_it_changes(latents: Tensor, positions: Tensor, traces: Tensor, mean: bool, rng: Generator) -> View:
    """Cut each cell's time line before the frames that change most. Return the mean of each stretch, at its middle, or
    its first token."""
    change = (latents[1:] - latents[:-1]).square().sum(-1)
    wanted = min(0.9, rng.uniform(*STRETCH_TOKENS) / change.numel())
    starts = torch.ones(latents.shape[:2], dtype=torch.bool)
    starts[1:] = change > change.flatten().kthvalue(max(1, round(change.numel() * (1 - wanted)))).values
    by_cell = starts.T.flatten()
    first = by_cell.nonzero().squeeze(1)
    latents, positions, traces = (x.transpose(0, 1).flatten(0, 1) for x in (latents, positions, traces))
    if mean:
        stretch = by_cell.cumsum(0) - 1
        size = stretch.bincount().float()[:, None]
        means = [x.new_zeros(len(first), x.shape[1]).index_add_(0, stretch, x) / size for x in (latents, positions)]
        latents, positions = means
        traces = torch.where(size == 1, traces[first], torch.nan)
    else:
        latents, positions, traces = latents[first], positions[first], traces[first]
    order = (positions[:, 0] * 10**4 + positions[:, 1] * 100 + positions[:, 2]).argsort(stable=True)
    return View(latents[order], positions[order], traces[order])


def _pool(x: Tensor, grid: int) -> Tensor:
    """(T, grid*grid, C) -> means of 2x2 blocks."""
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
        """Return the token ids of a text."""
        if text not in self._ids:
            if len(self._ids) > 200_000:
                self._ids.clear()
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def question(self, text: str) -> list[int]:
        """Return the token ids between the video and the answer to a question."""
        return self.ids(f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n")


def choose_questions(
    clip: EncodedClip, view: str, count: int, rng: Generator, prompts: Prompts, known: Set[str] = frozenset()
) -> list[Item]:
    """Return up to ``count`` random questions about ``clip`` whose evidence the ``view`` holds.

    At most ``SAME_CATEGORY`` of a category are asked, and one of a category in ``known``. ``known``: as level and category.
    ``rng``: picks them. ``prompts``: turns them into ids.
    """
    by_category: dict[str, int] = defaultdict(int)
    items: list[Item] = []
    for index in rng.permutation(len(clip.questions)):
        question = clip.questions[index]
        name = f"{clip.level} {question.category}"
        most = 1 if name in known else SAME_CATEGORY
        if by_category[question.category] == most or len(items) == count:
            continue
        if view == "frames" and any(word in question.question for word in BRIEF):
            continue
        by_category[question.category] += 1
        items.append(Item(prompts.question(question.question), prompts.ids(question.answer), name))
    return items


class Tracer(nn.Module):
    """Reads from the visual tokens in the decoder what is where, when and how it moves. Discarded after training.

    Ours: questions alone say too little about positions, which the tower cannot know, for a small model to learn them
    quickly. Places are read after the first layer, so that every later layer can use them; what an object has done is
    read three layers later.
    """

    weights: Tensor

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        width = decoder.config.hidden_size
        self.linear = nn.ModuleDict({str(layer): nn.Linear(width, len(TRACES)) for layer in TRACED})
        motion = [MOTION_WEIGHT if name.endswith(("moved", "span")) else 1.0 for name in TRACES]
        self.register_buffer("weights", torch.tensor(motion), persistent=False)
        self._hidden: dict[int, Tensor] = {}
        for layer in TRACED:
            decoder.layers[layer].register_forward_hook(partial(self._keep, layer))

    def _keep(self, layer: int, module: Any, inputs: Any, output: Any) -> None:
        self._hidden[layer] = output[0] if isinstance(output, tuple) else output

    def loss(self, batch: Pack) -> Tensor:
        """Return the loss of the batch that was run last, averaged over what is known."""
        total = torch.zeros((), device=batch.traces.device)
        for layer, num_traces in TRACED.items():
            hidden = self._hidden.pop(layer)[batch.is_video]
            predicted = self.linear[str(layer)](F.rms_norm(hidden, hidden.shape[-1:]))[:, :num_traces]
            wanted = batch.traces[:, :num_traces]
            known = ~wanted.isnan()
            if known.any():
                losses = F.smooth_l1_loss(predicted[known], wanted[known], beta=0.2, reduction="none")
                total = total + (losses * self.weights[:num_traces].expand(known.shape)[known]).mean()
        return total


class ClipBuffer:
    """The newest encoded clips. Each is seen a few times, in different views.

    ``tower``, ``grid``, ``device``: as for ``encode_clip``. ``first_seed``: seed of the first clip; seeds count up.
    """

    def __init__(self, tower: Any, grid: int, device: torch.device, first_seed: int) -> None:
        self.tower, self.grid, self.device, self.next_seed = tower, grid, device, first_seed
        self.clips: deque[EncodedClip] = deque(maxlen=CAPACITY)

    def add(self, count: int) -> None:
        """Encode ``count`` new clips. Beyond ``CAPACITY`` the oldest are dropped."""
        while count:
            scene = make_training_scene(self.next_seed)
            if scene is not None:
                self.clips.append(encode_clip(self.tower, self.next_seed, scene, self.grid, self.device))
                count -= 1
            self.next_seed += 1

    def draw(self, view: str, rng: Generator) -> tuple[list[EncodedClip], list[View]]:
        """Return different random clips, and a view of each, as many as fit into a batch."""
        clips: list[EncodedClip] = []
        views: list[View] = []
        longest = 0
        for i in rng.choice(len(self.clips), MOST_CLIPS, replace=False):
            made = make_view(self.clips[i], view, rng)
            longest = max(longest, len(made.latents))
            if clips and longest * (len(clips) + 1) > BATCH_TOKENS:
                break
            clips.append(self.clips[i])
            views.append(made)
        return clips, views


def view_shares(progress: float) -> tuple[float, ...]:
    """Return how often each of ``VIEWS`` is drawn: at first mostly short ones, later more and more whole clips."""
    if progress < 0.2:
        return (0.0, 0.0, 0.6, 0.1, 0.0, 0.0, 0.15, 0.15)
    if progress < 0.7:
        return (0.05, 0.08, 0.4, 0.1, 0.07, 0.08, 0.11, 0.11)
    return (0.18, 0.12, 0.2, 0.1, 0.08, 0.08, 0.12, 0.12)


def questions_a_clip(progress: float) -> int:
    """Return the questions per clip: few while the traces are being learned, which most answers need."""
    return 3 if progress < 0.05 else 8


def learning_rate(step: int, num_steps: int) -> float:
    """Return the factor on the learning rate: warm-up, constant, then linear to zero over the last third."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (num_steps - step) / (num_steps / 3))


def train_language(
    decoder: Any,
    tower: Any,
    tokenizer: Any,
    grid: int,
    num_steps: int,
    checkpoint: Path,
    device: torch.device,
    log: Callable[[str], None],
    seed: int = 0,
) -> None:
    """Train ``decoder`` in place, on top of the frozen ``tower``.

    ``tokenizer``: the decoder's. ``grid``: tokens per side of a frame. ``num_steps``: step to train up to. ``checkpoint``:
    state file, written every ``SAVE_EVERY`` steps; if it exists, training resumes from it, with new clips in memory.
    ``device``: of both halves. ``log``: receives lines of progress. ``seed``: another one gives other clips.
    """
    prompts = Prompts(tokenizer)
    use_packed_attention(decoder)
    tracer = Tracer(decoder).to(device)
    both = nn.ModuleDict({"decoder": decoder, "tracer": tracer})
    matrices = [p for name, p in decoder.named_parameters() if p.ndim == 2 and "layers" in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in decoder.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, MUON_FACTOR * LEARNING_RATE),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
        torch.optim.AdamW(tracer.parameters(), lr=LEARNING_RATE, weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    state = put_back(read_state(checkpoint), both, optimizers)
    step = state.get("step", 0)
    buffer = ClipBuffer(tower, grid, device, max(FIRST_SEED * (seed + 1), state.get("next_seed", 0) - FIRST_CLIPS))
    buffer.add(FIRST_CLIPS)
    scores: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=SCORED))
    while step < num_steps:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * learning_rate(step, num_steps)
        known = {name for name, rights in scores.items() if len(rights) == SCORED and np.mean(rights) > KNOWN}
        loss, trace_loss, right = _train_step(decoder, tracer, buffer, prompts, step, num_steps, known, seed)
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        both.zero_grad()
        for name, is_right in right:
            scores[name].append(is_right)
        step += 1
        if step % LOG_EVERY == 0:
            accuracies = " ".join(f"{name} {np.mean(rights):.2f}" for name, rights in sorted(scores.items()))
            log(f"language {step}/{num_steps} loss {loss:.3f} trace {trace_loss:.3f} {accuracies}")
        if step % SAVE_EVERY == 0 or step == num_steps:
            save_state(checkpoint, both, optimizers, step=step, next_seed=buffer.next_seed)


def _train_step(
    decoder: Any,
    tracer: Tracer,
    buffer: ClipBuffer,
    prompts: Prompts,
    step: int,
    num_steps: int,
    known: Set[str],
    seed: int,
) -> tuple[float, float, list[tuple[str, bool]]]:
    """Compute the gradients of one batch. Return its two losses, and which answers started right."""
    rng = np.random.default_rng([step, 3, seed])
    buffer.add(NEW_CLIPS)
    progress = step / num_steps
    view = VIEWS[rng.choice(len(VIEWS), p=view_shares(progress))]
    clips, views = buffer.draw(view, rng)
    items = [choose_questions(clip, view, questions_a_clip(progress), rng, prompts, known) for clip in clips]
    packed = pack(views, items, prompts.prefix, prompts.end, buffer.grid, END_WEIGHT).to(buffer.device)
    with mixed_precision(buffer.device):
        logits = run_pack(decoder, packed)
        trace_loss = tracer.loss(packed)
    loss, right = pack_loss(logits.float(), packed)
    (loss + TRACE_WEIGHT * trace_loss).backward()
    return loss.item(), trace_loss.item(), right
