"""The bundled model's language half, trained on questions about generated clips, on top of its frozen tower."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence, Set
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
from freres_cli.training.state import put_back, read_state, save_state
from freres_cli.world.draw import draw_scenes
from freres_cli.world.labels import ALWAYS_KNOWN, TRACES, trace_labels
from freres_cli.world.packing import Item, Pack, View, pack, pack_loss, run_pack, use_packed_attention
from freres_cli.world.questions import Question, questions_of
from freres_cli.world.script import make_scene
from freres_cli.world.train_tower import run_tower

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
FIRST_SEED = 10**7
LEARNING_RATE = 2e-3
MUON_FACTOR = 1
WARM_UP_STEPS = 60
NEW_CLIPS = 3  # per step
CAPACITY = 1600  # clips in memory; each is seen a few times, in different views
NOISE = 3.0  # grey levels
LOG_EVERY, SAVE_EVERY = 20, 50
# Motion is the hardest to learn, then counting flashes.
KINDS_SHOWN = ("motion", "repeat", "hit", "motion", "order", "repeat", "motion", "cut", "repeat", "motion")
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
    """A clip in main memory. ``latents``: (T, cells, D) float16. ``present``: (T, cells), whether there is an object.
    ``brief``: (T, cells), whether there is one that is visible or white only for a moment. ``traces``: (T, cells, 13),
    ``labels.TRACES``, NaN where unknown."""

    seed: int
    latents: Tensor
    present: Tensor
    brief: Tensor
    traces: Tensor
    grid: int
    questions: list[Question]


@torch.no_grad()
def encode_clips(tower: Any, seeds: Sequence[int], grid: int, device: torch.device) -> list[EncodedClip]:
    """Return the clips of some ``seeds``, drawn and encoded, with about as much noise as a video encoder leaves.

    ``tower``: the vision tower, on ``device``. ``grid``: tokens per side of a frame.
    """
    scenes = [make_scene(seed, KINDS_SHOWN[seed % len(KINDS_SHOWN)]) for seed in seeds]
    clips = []
    for seed, scene, frames in zip(seeds, scenes, draw_scenes(scenes, device=device), strict=True):
        generator = torch.Generator().manual_seed(seed)
        level = NOISE * torch.rand(1, generator=generator)
        noise = (torch.randn(frames.shape, generator=generator) * level).to(device)
        latents = run_tower(tower, (frames.float() + noise).clamp(0, 255)).flatten(1, 2).half().cpu()
        traces, present, brief = (part.flatten(1, 2) for part in trace_labels(scene, grid))
        traces[..., ALWAYS_KNOWN:][~present] = torch.nan
        clips.append(EncodedClip(seed, latents, present, brief, traces, grid, questions_of(seed, scene)))
    return clips


# How a training example thins its clip, and how many clips make a batch of each.
VIEWS = {"all": 6, "random": 10, "objects": 16, "frames": 10, "merged": 10, "pooled": 16}
BRIEF = ("moment", "instant", "briefly", "white")  # questions whose evidence may be in the frames left out


def make_view(clip: EncodedClip, name: str, rng: Generator) -> View:
    """Return the tokens of a clip as some compression might leave them. Merged tokens are placed at their centres."""
    t, cells, width = clip.latents.shape
    latents = clip.latents.float()
    frame, cell = torch.meshgrid(torch.arange(t), torch.arange(cells), indexing="ij")
    positions = torch.stack([frame, cell // clip.grid, cell % clip.grid], -1).float()
    traces = clip.traces
    if name == "merged":
        even = t - t % 2
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
        keep |= torch.from_numpy(rng.random(keep.shape) < rng.uniform(0.02, 0.06))
    elif name == "frames":
        keep &= torch.from_numpy(rng.random(t) < rng.uniform(0.3, 0.6))[:, None]
        keep[int(rng.integers(t))] = True
    return View(latents[keep], positions[keep], traces[keep])


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

    At most ``SAME_CATEGORY`` of a category are asked, and one of a category in ``known``. ``rng``: picks them.
    ``prompts``: turns them into ids.
    """
    by_category: dict[str, int] = defaultdict(int)
    items: list[Item] = []
    for index in rng.permutation(len(clip.questions)):
        question = clip.questions[index]
        most = 1 if question.category in known else SAME_CATEGORY
        if by_category[question.category] == most or len(items) == count:
            continue
        if view == "frames" and any(word in question.question for word in BRIEF):
            continue
        by_category[question.category] += 1
        items.append(Item(prompts.question(question.question), prompts.ids(question.answer), question.category))
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

    ``tower``, ``grid``, ``device``: as for ``encode_clips``. ``first_seed``: seed of the first clip; seeds count up.
    """

    def __init__(self, tower: Any, grid: int, device: torch.device, first_seed: int) -> None:
        self.tower, self.grid, self.device, self.next_seed = tower, grid, device, first_seed
        self.clips: deque[EncodedClip] = deque(maxlen=CAPACITY)

    def add(self, count: int) -> None:
        """Encode ``count`` new clips. Beyond ``CAPACITY`` the oldest are dropped."""
        seeds = range(self.next_seed, self.next_seed + count)
        self.clips.extend(encode_clips(self.tower, seeds, self.grid, self.device))
        self.next_seed += count

    def draw(self, count: int, rng: Generator) -> list[EncodedClip]:
        """Return ``count`` different random clips."""
        return [self.clips[i] for i in rng.choice(len(self.clips), count, replace=False)]


def view_shares(progress: float) -> tuple[float, ...]:
    """Return how often each view is drawn: at first mostly short ones, later more and more whole clips."""
    if progress < 0.3:
        return (0.0, 0.0, 0.9, 0.1, 0.0, 0.0)
    if progress < 0.75:
        return (0.04, 0.08, 0.64, 0.1, 0.07, 0.07)
    return (0.3, 0.15, 0.3, 0.1, 0.1, 0.05)


def questions_a_clip(progress: float) -> int:
    """Return the questions per clip: few while the traces are being learned, which most answers need."""
    return 3 if progress < 0.1 else 8


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
    while len(buffer.clips) < FIRST_CLIPS:
        buffer.add(20)
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
    view = list(VIEWS)[rng.choice(len(VIEWS), p=view_shares(progress))]
    clips = buffer.draw(VIEWS[view], rng)
    views = [make_view(clip, view, rng) for clip in clips]
    items = [choose_questions(clip, view, questions_a_clip(progress), rng, prompts, known) for clip in clips]
    packed = pack(views, items, prompts.prefix, prompts.end, buffer.grid, END_WEIGHT).to(buffer.device)
    loss, right = pack_loss(run_pack(decoder, packed), packed)
    trace_loss = tracer.loss(packed)
    (loss + TRACE_WEIGHT * trace_loss).backward()
    return loss.item(), trace_loss.item(), right
