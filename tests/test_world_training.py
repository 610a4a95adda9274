"""Training the bundled model: what is trained is what answers, and a stopped run resumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freres_cli.backbones import engine
from freres_cli.backbones.registry import load_language_model, load_vision_encoder
from freres_cli.training.muon import orthogonalize
from freres_cli.world import train_language
from freres_cli.world.bundled_model import GRID, WIDTH, bundled_model_dir
from freres_cli.world.labels import ALWAYS_KNOWN, TRACES, trace_labels
from freres_cli.world.packing import Item, View, pack, pack_loss, run_pack, use_packed_attention
from freres_cli.world.questions import questions_of
from freres_cli.world.script import make_scene
from freres_cli.world.train_language import (
    BATCH_TOKENS,
    FIRST_SEED,
    LONGEST_CLIP,
    LONGEST_TIMED,
    MOST_CLIPS,
    MOST_FRAMES,
    MOST_TOKENS,
    VIEWS,
    ClipBuffer,
    EncodedClip,
    Prompts,
    choose_frames,
    encode_clip,
    level_of,
    make_training_scene,
    make_view,
    view_shares,
)
from tests.tiny_models import CPU, video_tokens

QUESTIONS = (("What comes first?", "red square"), ("Where is the ring?", "top left"), ("How many?", "3"))
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_language_model("bundled", CPU, bundled_directory=bundled_model_dir())


def bundled_tower():
    """The stock class of the bundled model's vision tower, with its weights."""
    return load_vision_encoder("bundled", CPU, bundled_directory=bundled_model_dir()).tower


def make_batch(model, lengths=(3, 2)):
    """Two clips of different lengths with the same questions: the clips, the questions, and both packed."""
    torch.manual_seed(0)
    prompts = Prompts(model.tokenizer)
    items = [Item(prompts.question(text), prompts.ids(answer), text) for text, answer in QUESTIONS]
    clips = [torch.randn(frames, GRID, GRID, WIDTH) for frames in lengths]
    views = []
    for clip in clips:
        frames, cells = len(clip), GRID * GRID
        frame, cell = torch.meshgrid(torch.arange(frames), torch.arange(cells), indexing="ij")
        positions = torch.stack([frame, cell // GRID, cell % GRID], -1).reshape(-1, 3).float()
        views.append(View(clip.reshape(-1, WIDTH), positions, torch.full((frames * cells, len(TRACES)), torch.nan)))
    return clips, items, pack(views, [items, items[:2]], prompts.prefix, prompts.end, GRID, 0.1)


def test_what_is_trained_is_what_answers(model):
    """The packed batch gives each answer the same likelihood as ``freres ask`` does, one question at a time."""
    clips, _, batch = make_batch(model)
    attention = model.decoder.config._attn_implementation
    use_packed_attention(model.decoder)
    with torch.no_grad():
        logits = run_pack(model.decoder, batch).log_softmax(-1)
    model.decoder.config._attn_implementation = attention
    known = batch.targets >= 0
    row_of = torch.full(batch.targets.shape, -1)
    row_of[known] = torch.arange(int(known.sum()))
    checked = 0
    for (b, place, question, first), answer in zip(
        batch.firsts, [a for _, a in (*QUESTIONS, *QUESTIONS[:2])], strict=True
    ):
        ids = (*model.tokenizer.encode(answer), model.tokenizer.eos_token_id)
        assert ids[0] == first
        rows = row_of[b, place : place + len(ids)]
        ours = sum(float(logits[row, target]) for row, target in zip(rows, ids, strict=True))
        prompt = model.prompt(question)
        prefix = engine.prefill_video(model, prompt.prefix, video_tokens(clips[b], width=WIDTH), "hf")
        asked = float(engine.score_options(model, prefix, prompt.suffix, [ids])[0])
        assert ours == pytest.approx(asked, abs=1e-3)
        checked += 1
    assert checked == 5


def test_the_loss_is_that_of_the_answers(model):
    _, items, batch = make_batch(model)
    wanted = [list(item.answer) for item in (*items, *items[:2])]
    assert int((batch.targets >= 0).sum()) == sum(len(answer) + 1 for answer in wanted)
    logits = torch.zeros(int((batch.targets >= 0).sum()), len(model.tokenizer))
    loss, right = pack_loss(logits, batch)
    assert loss.item() == pytest.approx(np.log(len(model.tokenizer)), rel=1e-5) and len(right) == 5


def fake_clip(seed=3, level=1, width=8):
    """A clip with random latents."""
    scene = make_scene(seed, level=level)
    chosen = choose_frames(scene)
    traces, present, brief = (part.flatten(1, 2)[chosen] for part in trace_labels(scene, GRID))
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(chosen), GRID * GRID, width, generator=generator).half()
    return EncodedClip(seed, level, chosen, latents, present, brief, traces, GRID, questions_of(seed, scene))


def places(clip):
    """Frame, row and column of every token, (n, cells, 3)."""
    frame, cell = torch.meshgrid(clip.frames, torch.arange(GRID * GRID), indexing="ij")
    return torch.stack([frame, cell // GRID, cell % GRID], -1)


UNEVEN = next(seed for seed in range(100) if len(choose_frames(make_scene(seed, level=3)).diff().unique()) > 1)
CLIPS = ((3, 1), (UNEVEN, 3))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize(("seed", "level"), CLIPS)
def test_a_view_holds_tokens_of_its_clip_at_their_places(name, seed, level):
    clip = fake_clip(seed, level, 3)
    # Latents that hold their own position, and are exact in half precision.
    clip.frames = torch.arange(len(clip.frames)) if name == "merged" else clip.frames
    clip.latents = places(clip).half()
    view = make_view(clip, name, np.random.default_rng(0))
    assert torch.allclose(view.latents, view.positions, atol=1e-4)
    assert 0 < len(view.latents) <= min(clip.present.numel(), MOST_TOKENS)
    assert view.latents.isfinite().all() and len(view.traces) == len(view.latents)
    low, high = view.positions.amin(0), view.positions.amax(0)
    assert (low >= 0).all() and (high <= torch.tensor([int(clip.frames[-1]), GRID - 1, GRID - 1])).all()


@pytest.mark.parametrize(("seed", "level"), CLIPS)
def test_the_view_of_objects_thins_out_nothing_that_is_brief(seed, level):
    clip = fake_clip(seed, level, 3)
    index = {tuple(place): row for row, place in enumerate(places(clip).flatten(0, 1).tolist())}
    brief = set(clip.brief.flatten().nonzero().flatten().tolist())
    thinned = 0
    for number in range(4):
        view = make_view(clip, "objects", np.random.default_rng(number))
        kept = [index[tuple(place)] for place in view.positions.int().tolist()]
        assert clip.present.flatten()[kept].float().mean() > 2 * clip.present.float().mean()
        assert brief and brief <= set(kept)
        thinned += len(set(clip.present.flatten().nonzero().flatten().tolist()) - set(kept))
    assert thinned


def test_stretches_divide_each_cells_time_line_where_it_changes_most():
    clip = fake_clip(UNEVEN, 3)
    n, cells, _ = clip.latents.shape
    values = clip.latents.float()
    # One more channel for each frame, so that a mean says which frames it is of. They change equally from frame to frame.
    marks = 0.25 * torch.eye(n)[:, None].expand(n, cells, n)
    clip.latents = torch.cat([values, marks], -1).half()
    view = make_view(clip, "stretches", np.random.default_rng(0))
    members = view.latents[:, -n:] > 0
    size = members.sum(1)
    assert 1 < len(size) < 0.7 * n * cells and size.max() > 1
    cell = (view.positions[:, 1] * GRID + view.positions[:, 2]).long()
    change = (values[1:] - values[:-1]).square().sum(-1)
    is_cut = torch.zeros(n - 1, cells, dtype=torch.bool)
    for number in range(cells):
        mine = members[cell == number]
        assert torch.equal(mine.sum(0), torch.ones(n, dtype=torch.long))  # each frame is in one stretch
        for row in mine:
            first, last = row.nonzero()[0], row.nonzero()[-1]
            assert int(row.sum()) == last - first + 1  # in one piece
            if first:
                is_cut[first - 1, number] = True
    assert change[is_cut].min() >= change[~is_cut].max()
    total = torch.zeros(cells, 8).index_add_(0, cell, view.latents[:, :8] * size[:, None])
    torch.testing.assert_close(total, values.sum(0), atol=1e-3, rtol=1e-4)
    middles = torch.stack([clip.frames[row].float().mean() for row in members])
    torch.testing.assert_close(view.positions[:, 0], middles)
    # What an object has done is known of a single frame only.
    known = ~view.traces.isnan().all(1)
    assert torch.equal(known, size == 1)


def test_changed_tokens_are_tokens_of_the_clip():
    clip = fake_clip(UNEVEN, 3)
    view = make_view(clip, "changed", np.random.default_rng(0))
    index = {tuple(place): row for row, place in enumerate(places(clip).flatten(0, 1).tolist())}
    kept = [index[tuple(place)] for place in view.positions.int().tolist()]
    assert len(set(kept)) == len(kept) and set(range(GRID * GRID)) < set(kept)  # the first frame whole
    assert torch.equal(view.latents.half(), clip.latents.flatten(0, 1)[kept])
    assert torch.equal(view.traces, clip.traces.flatten(0, 1)[kept])
    assert kept == sorted(kept)


def test_the_frames_that_are_encoded_hold_all_that_is_brief():
    longest = extra = 0
    for seed in range(60):
        for level in (1, 2, 3):
            scene = make_scene(seed, level=level)
            chosen = choose_frames(scene)
            assert (chosen.diff() > 0).all() and chosen[0] == 0 and chosen[-1] < scene.num_frames
            brief = np.zeros(scene.num_frames, bool)
            for thing in scene.things:
                brief |= thing.visible if thing.facts.get("role") == "transient" else thing.is_white
            assert set(brief.nonzero()[0].tolist()) <= set(chosen.tolist())
            others = np.setdiff1d(chosen, brief.nonzero()[0])
            assert len(others) <= MOST_FRAMES
            if scene.num_frames <= MOST_FRAMES:
                assert len(chosen) == scene.num_frames
            longest = max(longest, scene.num_frames)
            extra += bool(len(chosen.diff().unique()) > 1)
    assert longest > 3 * MOST_FRAMES and extra


def test_a_batch_has_different_clips_and_no_more_tokens_than_fit():
    buffer = ClipBuffer(None, GRID, DEVICE, 0)
    buffer.clips.extend(fake_clip(seed, level_of(seed)) for seed in range(0, 4 * MOST_CLIPS, 2))
    sizes, rng = set(), np.random.default_rng(0)
    for name in VIEWS:
        for _ in range(3):
            clips, views = buffer.draw(name, rng)
            assert 1 <= len(views) == len(clips) == len({clip.seed for clip in clips}) <= MOST_CLIPS
            # A batch is as wide as its longest clip.
            assert len(views) * max(len(view.latents) for view in views) <= BATCH_TOKENS
            sizes.add(len(views))
    assert MOST_CLIPS in sizes and min(sizes) < 5


def test_the_newest_clips_are_kept_and_none_is_too_long(monkeypatch):
    monkeypatch.setattr(train_language, "CAPACITY", 3)
    monkeypatch.setattr(train_language, "encode_clip", lambda tower, seed, scene, *_: (seed, scene))
    buffer = ClipBuffer(None, GRID, DEVICE, 100)
    buffer.add(40)
    seeds = [seed for seed, _ in buffer.clips]
    assert len(seeds) == 3 and seeds == sorted(seeds) and seeds[-1] + 1 == buffer.next_seed > 140
    assert all(scene.num_frames <= LONGEST_CLIP for _, scene in buffer.clips)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.99])
def test_shares_of_views_add_up(progress):
    shares = view_shares(progress)
    assert len(shares) == len(VIEWS) and sum(shares) == pytest.approx(1) and min(shares) >= 0


@pytest.mark.parametrize("level", [1, 3])
def test_a_clip_is_encoded_where_its_labels_are(level):
    """Latents, traces and objects of the chosen frames. Times in long clips are not learned."""
    seeds = (seed for seed in range(FIRST_SEED, FIRST_SEED + 10**4) if level_of(seed) == level)
    made = ((seed, make_training_scene(seed)) for seed in seeds)
    fewest = MOST_FRAMES if level == 3 else 0
    seed, scene = next(pair for pair in made if pair[1] is not None and fewest < pair[1].num_frames < 2 * MOST_FRAMES)
    tower = bundled_tower()
    clip = encode_clip(tower, seed, scene, GRID, DEVICE)
    again = encode_clip(tower, seed, scene, GRID, DEVICE)
    n = len(clip.frames)
    assert torch.equal(clip.frames, choose_frames(scene)) and torch.equal(clip.latents, again.latents)
    assert clip.latents.shape == (n, GRID * GRID, WIDTH) and clip.latents.isfinite().all()
    assert clip.questions == questions_of(seed, scene) and clip.level == level
    _, present, brief = (part.flatten(1, 2)[clip.frames] for part in trace_labels(scene, GRID))
    assert torch.equal(clip.present, present) and torch.equal(clip.brief, brief)
    known = ~clip.traces.isnan()
    is_long = scene.num_frames > LONGEST_TIMED
    unknown = {TRACES.index(name) for name in ("frame", "first")} if is_long else set()
    for column in range(len(TRACES)):
        wanted = clip.present if column >= ALWAYS_KNOWN else torch.ones_like(clip.present)
        assert torch.equal(known[..., column], wanted & (column not in unknown)), TRACES[column]
    # Tokens with an object are further from the mean than those without.
    distance = (clip.latents.float() - clip.latents.float().mean((0, 1))).norm(dim=-1)
    assert distance[clip.present].mean() > distance[~clip.present].mean()


def first_scene(kind, wanted=lambda scene: True):
    scenes = (make_scene(seed, kind) for seed in range(1000))
    return next(scene for scene in scenes if wanted(scene))


def traces_of(scene, thing, frame=-1):
    """The traces at the token that contains the object's centre, by name, and whether it is there only briefly."""
    traces, present, brief = trace_labels(scene, GRID)
    x, y = (thing.centre[frame] // (96 / GRID)).astype(int)
    assert present[frame, y, x]
    return dict(zip(TRACES, traces[frame, y, x].tolist(), strict=True)), bool(brief[frame, y, x])


def test_traces_hold_when_and_where_an_object_appeared():
    scene = first_scene("order")
    thing = next(thing for thing in scene.things if thing.facts.get("rank") == 1)
    at, _ = traces_of(scene, thing)
    assert not trace_labels(scene, GRID)[1][0].any()
    assert at["x"] == pytest.approx(thing.centre[-1, 0] / 48 - 1) and at["x_moved"] == at["x_span"] == 0
    assert at["first"] == pytest.approx(int(thing.visible.argmax()) / 20 - 1)
    assert at["count"] == pytest.approx(3 / 2 - 1)
    assert traces_of(scene, thing, int(thing.visible.argmax()))[0]["count"] == pytest.approx(2 / 2 - 1)


def test_traces_hold_how_far_an_object_moved():
    scene = first_scene("motion", lambda scene: scene.things[-1].facts.get("way") == "left")
    thing = scene.things[-1]
    at, _ = traces_of(scene, thing)
    moved = (thing.centre[-1, 0] - thing.centre[0, 0]) / 24
    assert at["x_moved"] == pytest.approx(moved) and moved < 0
    assert at["x_span"] == pytest.approx(-moved) and at["y_span"] == 0


def test_traces_count_flashes_and_hold_touches():
    scene = first_scene("repeat", lambda scene: len(scene.things) == 1)
    thing = scene.things[0]
    assert traces_of(scene, thing)[0]["blinks"] == pytest.approx(thing.facts["blinks"] / 2)
    assert traces_of(scene, thing, int(thing.is_white.argmax()))[1] and not traces_of(scene, thing)[1]
    pushed = first_scene("hit", lambda scene: scene.facts["cause"] != "nothing" and len(scene.things) == 3)
    target = next(thing for thing in pushed.things if thing.facts.get("role") == "target")
    pusher = next(thing for thing in pushed.things if thing.name == pushed.facts["cause"])
    assert all(traces_of(pushed, thing)[0]["touched"] == 1 for thing in (target, pusher))
    assert traces_of(pushed, target, 0)[0]["touched"] == -1


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.3
