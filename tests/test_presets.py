"""Presets: the paper's token arithmetic, the order of precedence, and refusals that say what is wrong."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from freres_cli.errors import PresetError
from freres_cli.method.budget import plan_budget
from freres_cli.method.compress import compress_latents
from freres_cli.method.select import cut_tracks
from freres_cli.method.tokens import build_tokens
from freres_cli.pipeline.choices import choose_preset
from freres_cli.pipeline.planning import method_settings
from freres_cli.presets import (
    KEYS,
    REFERENCE,
    Settings,
    load_preset,
    merge_settings,
    parse_assignment,
    parse_grid,
    preset_names,
    presets_dir,
)

# Method section 7, 24x24 grid: preset -> (frames of the clip, anchors, dynamic, static, summary).
TABLE = {
    "compact-16f": (16 * 4, 8 * 512, 285, 24, 8),
    "mvbench-compact": (16 * 4, 4 * 256, 240, 12, 4),
    "qwen2-vl-7b": (24 * 4, 10 * 512, 1440, 30, 10),
    "qwen3-vl-8b": (28 * 4, 12 * 512, 1408, 36, 12),
    "dense-30fps": (1800, 60 * 512, 60 * 252, 60 * 3, 60),
}
TOTALS = {
    "compact-16f": 4413,
    "mvbench-compact": 1280,
    "qwen2-vl-7b": 6600,
    "qwen3-vl-8b": 7600,
    "dense-30fps": 46080,
}


def plan_of(name: str, num_frames: int, **flags):
    settings = merge_settings(load_preset(name), flags)
    knobs = method_settings(settings)
    return plan_budget(num_frames, parse_grid(settings.grid), knobs, settings.budget_tokens), knobs


@pytest.mark.parametrize("name", TABLE)
def test_the_token_arithmetic_of_the_paper_comes_out(name):
    num_frames, anchor, dynamic, static, summary = TABLE[name]
    plan, settings = plan_of(name, num_frames)
    assert plan.grid == (24, 24)
    expected = plan.expected
    assert (expected.anchor, expected.dynamic, expected.static, expected.summary) == (anchor, dynamic, static, summary)
    assert expected.total == TOTALS[name]
    # The same counts from real tracks of a clip in which everything moves a little.
    latents = torch.randn(num_frames, 24, 24, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.randn(
        24, 24, 2
    )
    tracks = compress_latents(latents, range(num_frames), plan, settings, 2)
    assert tracks.num_tokens_by_kind() == {"anchor": anchor, "dynamic": dynamic, "static": static, "summary": summary}
    assert len(build_tokens(tracks)) == TOTALS[name]


@pytest.mark.parametrize("num_frames", [8, 12, 16])
def test_mvbench_compact_holds_for_short_clips(num_frames):
    plan, _ = plan_of("mvbench-compact", num_frames)
    assert plan.expected.total == 1280


@pytest.mark.parametrize("share", [0.5, 0.25, 0.2])
def test_a_smaller_budget_has_the_anchors_and_bands_that_repacking_keeps(share):
    """It thins anchors before it drops them, and drops them only where repacking would leave less than a fifth."""
    latents = torch.randn(32, 6, 6, 8, generator=torch.Generator().manual_seed(1)).cumsum(0)
    tracks = {}
    for budget in (576, int(share * 576)):
        plan, settings = plan_of("bundled", 32, budget_tokens=budget)
        tracks[budget] = compress_latents(latents, range(32), replace(plan, max_events=0), settings, 8)
    repacked, direct = cut_tracks(tracks[576], settings, budget), tracks[budget]
    num_kept = len(repacked.anchor_gop.unique())
    assert len(direct.anchor_gop.unique()) >= min(num_kept, int(len(repacked.anchor_gop) / (36 * 0.2)))
    assert int(direct.coefficient_band.max()) >= int(repacked.coefficient_band.max())


@pytest.mark.parametrize("name", ["bundled", *TABLE])
def test_anchors_fall_more_slowly_than_the_budget_until_they_are_thin(name):
    num_frames = 32 if name == "bundled" else TABLE[name][0]
    reference = merge_settings(load_preset(name), {}).budget_tokens
    for share in (0.7, 0.4, 0.2, 0.1):
        plan, settings = plan_of(name, num_frames, budget_tokens=int(share * reference))
        thinnest = plan.num_tokens_per_frame * 0.2
        is_thin = plan.anchor_target_tokens < (plan.num_anchors + 1) * thinnest
        assert plan.num_anchors >= settings.anchors or is_thin, share


def test_short_clips_keep_frames_between_anchors():
    """At a small budget, not every frame of a short clip becomes a thin anchor."""
    plan, _ = plan_of("bundled", 9, budget_tokens=60)
    assert plan.num_anchors == 3


def test_the_paper_s_other_numbers():
    """Uniform 1 fps, Fourier 8x and full, of one minute at 30 fps: plain arithmetic that the presets' grid must give."""
    plan, _ = plan_of("dense-30fps", 1800)
    tokens = plan.num_tokens_per_frame
    assert (60 * tokens, 1800 * tokens // 8, 1800 * tokens) == (34_560, 129_600, 1_036_800)
    assert 16 * tokens / 4413 == pytest.approx(2.1, abs=0.02)


def test_every_shipped_preset_is_whole_and_says_where_its_values_come_from():
    assert set(preset_names()) == {"bundled", "long-video", *TABLE}
    for name in preset_names():
        preset = load_preset(name)
        assert preset.values["description"]
        for line in preset.path.read_text().splitlines()[1:]:
            key = line.split(":")[0]
            assert key in KEYS or line.startswith("# For method"), line
        assert "ours" in preset.path.read_text()


def test_the_papers_presets_use_its_method_and_the_others_ours():
    methods = {name: load_preset(name).values["method"] for name in preset_names()}
    assert methods == {"bundled": "adaptive", "long-video": "adaptive", **dict.fromkeys(TABLE, "fre-res")}
    assert choose_preset("bundled") == "bundled" and choose_preset("a/b") == "long-video"
    ours, theirs = (dict(load_preset(name).values) for name in ("long-video", "qwen2-vl-7b"))
    same = {key for key in ours if ours[key] == theirs.get(key)}
    assert set(ours) == set(theirs) and set(ours) - same == {"description", "method"}


def test_flags_win_over_the_preset_and_sources_are_kept():
    settings = merge_settings(load_preset("compact-16f"), {"budget_tokens": 3000, "tau": 0.2})
    assert (settings.budget_tokens, settings.sources["budget_tokens"]) == (3000, "flag")
    assert settings.sources["variant"] == "preset compact-16f"
    assert settings.sources["tokens_per_frame"] == "default"
    assert settings.reference_budget_tokens == 4413


def test_settings_are_the_keys_and_each_knows_its_source():
    settings = merge_settings(load_preset("compact-16f"), {"tau": None}, "argument")
    keys = set(KEYS) - {"description"} | {REFERENCE}
    assert (
        {field.name for field in fields(Settings)} - {"sources", "file", "names"}
        == set(settings.values())
        == set(settings.sources)
        == keys
    )
    assert settings.record() == {
        key: {"value": getattr(settings, key), "source": settings.sources[key]} for key in settings.values()
    }
    assert settings.record()["tau"] == {"value": None, "source": "argument"}
    other = settings.with_values("eval", budget_tokens=7)
    assert other.record() == {**settings.record(), "budget_tokens": {"value": 7, "source": "eval"}}
    assert settings.budget_tokens == 4413, "the settings before are as they were"


def test_a_rate_or_a_count_by_flag_chooses_the_sampling():
    settings = merge_settings(load_preset("compact-16f"), {"sample_fps": 2.0})
    assert settings.sample == "fps" and settings.track_density == 1
    assert merge_settings(load_preset("compact-16f"), {"sample_count": 12}).track_density == 4
    assert merge_settings(load_preset("dense-30fps"), {"sample_count": 8}).sample == "count"
    for named in ({"sample_fps": 2.0}, {"sample_fps": 2.0, "sample": "fps"}):
        assert merge_settings(load_preset("long-video"), named).track_density == 1
    for wrong in ({"sample_fps": 2.0, "sample": "native"}, {"sample_count": 8, "sample": "fps"}):
        with pytest.raises(PresetError, match=" and sample: expected sample "):
            merge_settings(load_preset("dense-30fps"), wrong)
    assert merge_settings(load_preset("long-video"), {"sample": "native", "sample_fps": None}).sample == "native"
    with pytest.raises(PresetError, match="got both"):
        merge_settings(load_preset("bundled"), {"sample_fps": 2.0, "sample_count": 8})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget_token: 3", "unknown setting 'budget_token'"),
        ("budget_tokens: 0", "expected at least 1, got 0"),
        ("budget_tokens: many", "expected a whole number, got 'many'"),
        ("budget_tokens: 1.5", "expected a whole number"),
        ("budget_tokens: true", "expected a whole number, got True"),
        ("temporal_share: 2", "expected 0 to 0.95, got 2"),
        ("temporal_share: .nan", "expected 0 to 0.95"),
        ("variant: magic", "expected one of absorber"),
        ("grid: 24", "grid: expected a word"),
        ("grid: 0x04g", "expected ROWSxCOLUMNS"),
        ("grid: 300x4", "expected ROWSxCOLUMNS"),
        ("- a\n- b", "expected a mapping"),
        ("anchors: 3\nanchors: 4", "'anchors' is given twice"),
        ("tau: 2020-13-45", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("sample: fps\nsample_fps: 0", "expected 1e-06 to 1000"),
    ],
)
def test_a_bad_preset_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PresetError) as caught:
        load_preset(str(path))
    assert message in caught.value.message and str(path) in caught.value.message and "\n" not in caught.value.message


def test_a_near_miss_is_suggested():
    with pytest.raises(PresetError) as caught:
        load_preset("compact-16")
    assert "compact-16f" in caught.value.hint


def test_sampling_without_its_value_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sample: count\n")
    with pytest.raises(PresetError, match="needs sample_count"):
        merge_settings(load_preset(str(path)), {})


def test_assignments():
    assert parse_assignment("pooled_side=8") == ("pooled_side", 8)
    assert parse_assignment("tau=auto") == ("tau", None)
    assert parse_assignment("grid=8x8") == ("grid", "8x8")
    for text in ("pooled_side", "pooled_side=x", "nothing=1"):
        with pytest.raises(PresetError):
            parse_assignment(text)


def test_presets_lie_where_the_package_finds_them():
    assert presets_dir().is_dir()
