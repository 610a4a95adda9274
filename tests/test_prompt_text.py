"""The text around frames: it is counted without a model as the session prefills it, and tokens share instants."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from freres_cli.backbones.engine import score_options
from freres_cli.bundle.store import read_bundle
from freres_cli.devices import choose_device
from freres_cli.method.compress import compress_latents
from freres_cli.pipeline.prompt_text import (
    TEXT_SHARE,
    PromptText,
    count_frame_text,
    describe_text,
    read_prompt_text,
    recall_text,
    record_text,
    settle_tokens,
)
from freres_cli.pipeline.query import Query
from freres_cli.pipeline.session import AskRequest, Session, open_session
from freres_cli.pipeline.tokens import make_tokens
from freres_cli.records import TOKEN_KINDS, nearest_frames
from freres_cli.workflows.training_loop import TrainingLoop
from tests import family_contract
from tests.clips import write_clip
from tests.compressed_clips import compress as compress_clip
from tests.compressed_clips import smooth_clip
from tests.runner import run_freres
from tests.test_presets import TABLE, plan_of
from tests.tiny_families import FAMILY_CASES

tiny, one_thread = family_contract.tiny, family_contract.one_thread
CPU = choose_device("cpu")
QUESTION = "what moves?"
ANCHOR, DYNAMIC, STATIC, SUMMARY = range(len(TOKEN_KINDS))
# Tokens of "<12.3 seconds>" and the two markers in Qwen3-VL's vocabulary, where each digit is one.
TEXT_OF_A_FRAME = 10


# Counting


def test_text_counted_without_weights_is_what_the_prompt_holds(tiny):
    counter = tiny.case.language_class.load_without_weights(tiny.checkpoint)
    assert all(parameter.is_meta for parameter in counter.half.parameters())
    for keep in (None, tiny.keep):
        video = tiny.tokens(keep)
        text = read_prompt_text(counter, video.grid, video.frame_seconds)
        prompt = tiny.model.prompt("")
        rows = tiny.model.splice(prompt.prefix, video)
        assert text.around_video == len(prompt.prefix) + len(prompt.suffix)
        assert text.count_overhead(video) == len(rows) - len(prompt.prefix) - len(video)


def test_recorded_text_is_recalled():
    text = PromptText(torch.tensor([9, 9, 10, 10, 10, 9]), 3, 12)
    recorded = record_text(text)
    assert recorded["text_per_frame"] == [2, 9, 3, 10, 1, 9]
    recalled = recall_text(recorded)
    assert torch.equal(recalled.per_frame, text.per_frame)
    assert (recalled.in_video, recalled.around_video) == (3, 12)
    assert recall_text(record_text(None)) is None


# Sharing instants


@pytest.fixture(scope="module", params=["mvbench-compact", "qwen2-vl-7b", "qwen3-vl-8b"])
def preset(request):
    """Tracks and tokens of a preset, from a clip in which some cells move fast and some hardly."""
    num_frames = TABLE[request.param][0]
    plan, settings = plan_of(request.param, num_frames)
    generator = torch.Generator().manual_seed(0)
    speed = torch.rand(24, 24, 1, generator=generator) ** 2
    noise = torch.randn(num_frames, 24, 24, 2, generator=generator)
    latents = torch.randn(24, 24, 2, generator=generator) + speed * (0.5 * noise + noise.cumsum(0))
    tracks = compress_latents(latents, [i / 2 for i in range(num_frames)], plan, settings, 2)
    return tracks, make_tokens(tracks, "absorber")


def test_at_the_presets_text_is_at_most_a_tenth(preset):
    _, tokens = preset
    per_frame = torch.full(tokens.grid[:1], TEXT_OF_A_FRAME)
    settled, moves = settle_tokens(tokens, per_frame)
    assert count_frame_text(tokens, per_frame) > TEXT_SHARE * len(tokens)
    assert count_frame_text(settled, per_frame) == moves.text_after <= TEXT_SHARE * len(tokens)
    is_anchor = tokens.kind == ANCHOR
    assert torch.equal(settled.positions[is_anchor], tokens.positions[is_anchor])
    assert torch.equal(settled.positions[:, 1:], tokens.positions[:, 1:])
    assert torch.equal(settled.latents, tokens.latents)
    moved = (nearest_frames(settled.positions[:, 0], tokens.grid[0])) != nearest_frames(
        tokens.positions[:, 0], tokens.grid[0]
    )
    shift = (settled.seconds - tokens.seconds).abs()
    assert moves.moved == int(moved.sum()) > 0 and bool((shift[~moved] == 0).all())
    assert moves.mean_s == pytest.approx(float(shift[moved].mean())) and moves.max_s == float(shift.max())
    # again, nothing has to move
    assert settle_tokens(settled, per_frame) == (settled, None)


def test_a_stretch_is_the_share_of_its_gop(preset):
    """The dynamic tokens of a cell divide the residual frames of its GoP, a static or summary token has all of them."""
    tracks, tokens = preset
    first = tracks.gop_anchor_frame[tokens.gop] + 0.5
    ends = torch.stack([first, first + tracks.gop_num_residuals[tokens.gop]], dim=1)
    alone = (tokens.kind == STATIC) | (tokens.kind == SUMMARY)
    assert torch.equal(tokens.stretches[alone], ends[alone].float())
    dynamic = tokens.kind == DYNAMIC
    low, high = tokens.stretches[dynamic].unbind(1)
    t = tokens.positions[dynamic, 0]
    assert bool(((low <= t) & (t < high)).all())
    keys = [tuple(row) for row in torch.cat([tokens.gop[:, None], tokens.positions[:, 1:]], dim=1)[dynamic].tolist()]
    total: dict[tuple[float, ...], float] = {}
    lengths_at = zip(keys, t.tolist(), (high - low).tolist(), strict=True)
    for key, length in {(key, at): length for key, at, length in lengths_at}.items():
        total[key[0]] = total.get(key[0], 0.0) + length
    lengths = dict(zip(keys, (ends[:, 1] - ends[:, 0])[dynamic].tolist(), strict=True))
    assert total == pytest.approx(lengths, abs=1e-2) and max(map(keys.count, keys[:200])) > 1


def test_knowing_the_stretches_keeps_tokens_nearer_to_them(preset):
    _, tokens = preset
    per_frame = torch.full(tokens.grid[:1], 3 * TEXT_OF_A_FRAME // 2)
    settled, moves = settle_tokens(tokens, per_frame)
    blind, unknown = settle_tokens(replace(tokens, stretches=None), per_frame)
    low, high = tokens.stretches.unbind(1)
    frames = [nearest_frames(part.positions[:, 0], tokens.grid[0]) for part in (tokens, settled, blind)]
    far = [((low - f).clamp(min=0) + (f + 1 - high).clamp(min=0))[f != frames[0]] for f in frames[1:]]
    assert far[0].sum() < far[1].sum()
    assert unknown.outside is None
    is_out = ((frames[1] < low) | (frames[1] >= high)) & (frames[1] != frames[0])
    assert moves.outside == int(is_out.sum())


def test_every_token_of_a_clip_stays(tiny):
    """Whatever their kinds are: at its own frame, each equals the stock model's."""
    video = tiny.tokens()
    text = torch.full(video.grid[:1], 10**6)
    for kind in (ANCHOR, DYNAMIC):
        whole = replace(video, kind=torch.full_like(video.kind, kind))
        assert settle_tokens(whole, text) == (whole, None)
    some = replace(tiny.tokens(tiny.keep), kind=torch.full((len(tiny.keep),), ANCHOR, dtype=torch.uint8))
    assert settle_tokens(some, text) == (some, None)


def test_tokens_go_to_the_anchors_if_these_alone_are_too_many(preset):
    _, tokens = preset
    settled, moves = settle_tokens(tokens, torch.full(tokens.grid[:1], 10**6))
    frames = [nearest_frames(part.positions[:, 0], part.grid[0]) for part in (settled, tokens)]
    anchors = frames[1][tokens.kind == ANCHOR].unique()
    assert torch.equal(frames[0].unique(), anchors)
    assert moves.text_after == 10**6 * len(anchors)


def test_a_session_reads_the_settled_tokens(tiny):
    """In families that write text around frames, tokens that may move share a frame; in the others, nothing moves."""
    some = tiny.tokens(tiny.keep)
    some = replace(some, kind=torch.full((len(tiny.keep),), DYNAMIC, dtype=torch.uint8))
    session = Session(tiny.model, some, 80, "hf", 0.0)
    per_frame = tiny.model.text_per_frame(some)
    if count_frame_text(some, per_frame) <= TEXT_SHARE * len(some):
        assert session.moves is None and session.notes == () and torch.equal(session.tokens.positions, some.positions)
    else:
        assert nearest_frames(session.tokens.positions[:, 0], 4).unique().numel() == 1
        assert session.notes == (session.moves.describe(len(some)),)
        assert f"{session.moves.moved} of {len(some)} tokens" in session.notes[0]
    session.ask(QUESTION, max_new_tokens=1)
    rows = len(tiny.model.splice(tiny.prompt.prefix, session.tokens))
    assert session.text_overhead_tokens == rows - len(tiny.prompt.prefix) - len(some)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_an_adapter_is_trained_on_the_tokens_that_ask_reads(name, tmp_path):
    case = next(case for case in FAMILY_CASES if case.name == name)
    tiny = family_contract.Tiny(case, tmp_path)
    plan, knobs = plan_of("bundled", 24, grid=f"{case.grid[0]}x{case.grid[1]}", budget_tokens=60, anchors=2)
    frames = tiny.vision.encode(case.frames(24))
    tracks = compress_latents(frames, [i / 4 for i in range(24)], plan, knobs, tiny.vision.width)
    session = Session(tiny.model, make_tokens(tracks, "absorber"), 24 * 20, "max", 0.0)
    assert session.moves is not None
    ids, answers = tiny.model.prompt(QUESTION), [(97, 98), (99,)]
    question = SimpleNamespace(prefix=ids.prefix, suffix=ids.suffix, answers=answers)
    settings = SimpleNamespace(variant="absorber", text_after="max")
    trainer = SimpleNamespace(settings=settings, model=tiny.model, modules=None)
    example = SimpleNamespace(questions=[question], content=lambda budget: tracks)
    [trained] = TrainingLoop._scores(trainer, example, 0, [0])
    prefix, suffix = session._prompt(Query(QUESTION))
    assert torch.allclose(trained, score_options(tiny.model, prefix, suffix, answers), atol=1e-3)


# What the verbs report


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 60, size=(96, 64), fps=10)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "smolvlm", "minicpmv4_7"])
def compressed(request, clip, tmp_path_factory):
    """A model, a bundle, what compress and its plan said, and the flags."""
    case = next(case for case in FAMILY_CASES if case.name == request.param)
    folder = tmp_path_factory.mktemp(case.name)
    case.make(folder / "model")
    rows, columns = case.grid
    flags = ("compress", clip, "--model", folder / "model", "--frames", 30, "--grid", f"{rows}x{columns}")
    flags = (*flags, "--budget", 5 * rows * columns, "--device", "cpu")
    planned = run_freres(*flags, "--dry-run", "--json")
    made = run_freres(*flags, "-o", folder / "b.pt", "--json")
    assert planned.status == made.status == 0, made.err
    return folder, made.json, planned.json, flags


COUNTS = ("text_overhead_tokens", "context_tokens", "moved_tokens", "moved_outside", "mean_shift_s", "max_shift_s")


def test_every_verb_reports_what_is_prefilled(compressed):
    folder, made, planned, _ = compressed
    asked = run_freres("ask", folder / "b.pt", QUESTION, "--max-new-tokens", 1, "--json").json
    shown = run_freres("inspect", folder / "b.pt", "--json").json
    session = open_session(AskRequest(folder / "b.pt", CPU))
    ids = session.model.prompt(QUESTION)
    rows = session.model.splice(ids.prefix, session.tokens)
    overhead = len(rows) - len(ids.prefix) - len(session.tokens)
    assert [made[name] for name in COUNTS] == [shown[name] for name in COUNTS]
    assert made["text_overhead_tokens"] == asked["text_overhead_tokens"] == overhead
    # a byte is a token
    assert asked["context_tokens"] == made["context_tokens"] + len(QUESTION) == len(rows) + len(ids.suffix)
    assert [made[name] for name in COUNTS[2:]] == [asked[name] for name in COUNTS[2:]]
    writes = count_frame_text(session.tokens, session.model.text_per_frame(session.tokens)) > 0
    assert (made["moved_tokens"] > 0) == writes == any("text around every frame" in note for note in asked["notes"])
    assert planned["text_overhead_tokens"] >= overhead and planned["context_tokens"] >= made["context_tokens"]
    assert planned["text_overhead_tokens"] <= 1.5 * overhead


def test_a_cut_is_counted_anew_without_the_model(compressed, monkeypatch):
    folder, made, _, _ = compressed
    shutil.move(folder / "model", folder / "elsewhere")
    try:
        run = run_freres("repack", folder / "b.pt", "--budget", 60, "-o", folder / "cut.pt", "--force", "--json")
    finally:
        shutil.move(folder / "elsewhere", folder / "model")
    assert run.status == 0, run.err
    session = open_session(AskRequest(folder / "cut.pt", CPU))
    ids = session.model.prompt("")
    rows = len(session.model.splice(ids.prefix, session.tokens))
    assert run.json["text_overhead_tokens"] == rows - len(ids.prefix) - len(session.tokens)
    assert run.json["context_tokens"] == rows + len(ids.suffix) < made["context_tokens"]
    assert (session.moves is None) == (run.json["moved_tokens"] == 0)


def test_text_is_null_without_a_tokenizer(compressed):
    folder, _, _, flags = compressed
    bare = folder / "bare"
    shutil.copytree(folder / "model", bare, dirs_exist_ok=True)
    for path in (*bare.glob("tokenizer*"), *bare.glob("special_tokens*")):
        path.unlink()
    flags = tuple(bare if flag == folder / "model" else flag for flag in flags)
    assert run_freres(*flags, "--dry-run", "--json").json["context_tokens"] is None
    assert "context tokens" not in run_freres(*flags, "--dry-run").out
    made = run_freres(*flags, "-o", folder / "bare.pt", "--force", "--json").json
    assert [made[name] for name in COUNTS] == [None] * len(COUNTS)
    assert any("text in the model's prompt is not counted" in note for note in made["notes"])
    assert "not counted" in run_freres("inspect", folder / "bare.pt").out
    assert recall_text(read_bundle(folder / "bare.pt").manifest["geometry"]) is None


def test_inspect_says_what_moved(compressed):
    folder, made, _, _ = compressed
    out = run_freres("inspect", folder / "b.pt").out
    assert f"{made['context_tokens']} tokens without a question, {made['text_overhead_tokens']} of them text" in out
    assert (f"{made['moved_tokens']} tokens move" in out) == (made["moved_tokens"] > 0)


@pytest.mark.parametrize("variant", ["absorber", "idct", "temporal"])
def test_text_is_counted_for_the_tokens_of_the_variant(variant):
    tracks, _, _ = compress_clip(smooth_clip(40, (8, 8)), 300, variant=variant)
    text = PromptText(torch.arange(40) % 7, 3, 12)
    tokens, _ = settle_tokens(make_tokens(tracks, variant), text.per_frame)
    assert describe_text(tracks, variant, text)["text_overhead_tokens"] == text.count_overhead(tokens)
