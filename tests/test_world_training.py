"""Training the bundled model: what is trained is what answers, and a stopped run resumes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from freres_cli.backbones import engine
from freres_cli.backbones.registry import load_language_model
from freres_cli.training.muon import orthogonalize
from freres_cli.world import train_language, train_tower
from freres_cli.world.bundled_model import GRID, WIDTH, bundled_model_dir
from freres_cli.world.labels import TRACES, trace_labels
from freres_cli.world.packing import Item, View, pack, pack_loss, run_pack, use_packed_attention
from freres_cli.world.script import make_scene
from freres_cli.world.train_language import VIEWS, EncodedClip, Prompts, make_view
from tests.runner import check_failure, run_freres
from tests.tiny_models import CPU, video_tokens

QUESTIONS = (("What comes first?", "red square"), ("Where is the ring?", "top left"), ("How many?", "3"))
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_language_model("bundled", CPU, bundled_directory=bundled_model_dir())


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


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_holds_tokens_of_its_clip_at_their_places(name):
    scene = make_scene(3)
    frames, cells = scene.num_frames, GRID * GRID
    frame, cell = torch.meshgrid(torch.arange(frames), torch.arange(cells), indexing="ij")
    # Latents that hold their own position.
    latents = torch.stack([frame, cell // GRID, cell % GRID], -1).half()
    traces, present, brief = (part.flatten(1, 2) for part in trace_labels(scene, GRID))
    clip = EncodedClip(3, latents, present, brief, traces, GRID, [])
    view = make_view(clip, name, np.random.default_rng(0))
    assert torch.equal(view.latents, view.positions) and 0 < len(view.latents) <= frames * cells
    if name == "objects":
        kept = (view.positions[:, 0] * cells + view.positions[:, 1] * GRID + view.positions[:, 2]).long()
        assert present.flatten()[kept].float().mean() > 2 * present.float().mean()
        # What is visible only for a moment is never thinned out.
        assert set(brief.flatten().nonzero().flatten().tolist()) <= set(kept.tolist())


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


def test_world_train_writes_a_model_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(train_language, "FIRST_CLIPS", 20)
    monkeypatch.setattr(train_language, "LOG_EVERY", 1)
    monkeypatch.setattr(train_tower, "LOG_EVERY", 1)
    folder = tmp_path / "model"
    flags = ("world", "train", "-o", folder, "--tower-steps", 2, "--json")
    first = run_freres(*flags, "--steps", 1)
    assert first.status == 0, first.err
    more = run_freres("world", "train", "-o", folder, "--tower-steps", 2, "--steps", 2)
    # The tower was finished; the language half resumes after its first step.
    assert more.out == f"{folder}\n" and "tower" not in more.err and "language 1/2" not in more.err
    assert "language 2/2" in more.err
    info = json.loads((folder / "MODEL_INFO.json").read_text())
    for other in (("--seed", 7), ("--start", "bundled"), ("--steps", 1)):
        refused = run_freres("world", "train", "-o", folder, "--tower-steps", 2, "--steps", 2, *other)
        check_failure(refused, 2, "the training of another run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    check_failure(run_freres("world", "train", "-o", tmp_path / "mine"), 2, "holds something other than a training run")
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    assert info["language_steps"] == 2 and info["choices_as"] == "words" and info["freres_trained"]
    trained = load_language_model(str(folder), CPU)
    assert trained.choices_as == "words" and trained.width == WIDTH


def test_training_starts_from_a_model_and_leaves_the_tower_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(train_language, "FIRST_CLIPS", 20)
    folder = tmp_path / "model"
    flags = ("--start", "bundled", "--tower-steps", 0, "--steps", 1)
    run = run_freres("world", "train", "-o", folder, "-q", *flags)
    assert run.status == 0 and run.err == ""
    before, after = (load_file(path / "model.safetensors") for path in (bundled_model_dir(), folder))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if "visual" in key} <= same < before.keys()
    check_failure(run_freres("world", "train", "-o", tmp_path / "b", "--start", tmp_path), 5, "training can start from")
    check_failure(run_freres("world", "train", "-o", tmp_path / "b", "--start", "nowhere"), 2, "no such folder")
