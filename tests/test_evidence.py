"""Where a model looks: the attention that stock transformers computes, and the instant a question is about."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freres_cli.backbones.engine import prefill_video
from freres_cli.backbones.evidence import FIRST_SHARE, LAST_SHARE, find_evidence, find_places, why_no_evidence
from freres_cli.cli.ask import _print_spans
from freres_cli.method.allocation import frame_edges_s, frames_at, share_of_interval, token_boxes
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.query import Query
from freres_cli.workflows.ask import MAX_SPANS, locate_evidence
from freres_cli.world.make import CODECS, clip_seed, encode_scene
from freres_cli.world.questions import questions_of
from freres_cli.world.script import make_scene
from tests import family_contract
from tests.clips import write_clip
from tests.loaded_models import Wrapped, loaded_models
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.pipeline_fixtures import options_with
from tests.runner import check_failure, run_freres
from tests.tiny_models import video_tokens

tiny, one_thread = family_contract.tiny, family_contract.one_thread


def stock_weights(tiny):
    """The eager attention of the last row in every layer of the stock model, mean over heads: (layers, L)."""
    before = tiny.stock.config._attn_implementation
    tiny.stock.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = tiny.stock(**tiny.path.forward_inputs(tiny.path.ids), output_attentions=True)
    finally:
        tiny.stock.set_attn_implementation(before)
    return torch.stack([layer[0, :, -1].double().mean(0) for layer in out.attentions])


def test_shares_are_the_weights_of_stock_eager_attention(tiny):
    if tiny.case.is_hybrid:
        assert "running state" in why_no_evidence(tiny.model)
        return
    assert why_no_evidence(tiny.model) is None
    tokens, ids = tiny.tokens(), tiny.prompt
    prefix = prefill_video(tiny.model, ids.prefix, tokens, "hf")
    places = find_places(tiny.model, ids.prefix, tokens, "hf")
    assert torch.equal(places, tiny.path.is_visual.nonzero()[:, 0])
    before = tiny.model.decoder.config._attn_implementation
    found = find_evidence(tiny.model, prefix, places, ids.suffix)
    assert tiny.model.decoder.config._attn_implementation == before
    assert prefix.cache.get_seq_length() == prefix.num_tokens, "the prefix is as it was"
    weights = stock_weights(tiny)
    picked = weights[int(FIRST_SHARE * len(weights)) : max(1, round(LAST_SHARE * len(weights)))]
    assert len(picked) == found.num_layers < len(weights)
    expected = picked.mean(0)[places]
    assert float(found.shares.sum()) == pytest.approx(1, abs=1e-9)
    assert found.visual_share == pytest.approx(float(expected.sum()), rel=1e-3)
    torch.testing.assert_close(found.shares, expected / expected.sum(), atol=1e-6, rtol=1e-3)


def test_layers_from_the_middle_to_just_before_the_end_are_read(tiny, monkeypatch):
    """Of ten layers, each of which looks at a token of its own."""
    tokens, ids = tiny.tokens(), tiny.prompt
    prefix = prefill_video(tiny.model, ids.prefix, tokens, "hf")
    places = find_places(tiny.model, ids.prefix, tokens, "hf")
    weights = torch.zeros(10, prefix.num_tokens + len(ids.suffix))
    weights[torch.arange(10), places[:10]] = 1
    monkeypatch.setattr(tiny.model, "attend_from_last", lambda rows, cache: weights)
    found = find_evidence(tiny.model, prefix, places, ids.suffix)
    assert found.num_layers == 4 and found.shares.nonzero()[:, 0].tolist() == [5, 6, 7, 8]


def test_each_token_is_found_at_its_own_row(tiny):
    """Of shuffled and thinned tokens, too: the row holds the token's own latent."""
    generator = torch.Generator().manual_seed(3)
    size = tiny.latents[..., 0].numel()
    keep = torch.randperm(size, generator=generator)[: size // 2]
    tokens = video_tokens(tiny.latents, keep, width=tiny.model.width)
    ids = tiny.model.prompt("?").prefix
    rows = tiny.model.splice(ids, tokens)
    assert torch.equal(rows.embeds[find_places(tiny.model, ids, tokens)], tokens.latents.to(rows.embeds.dtype))


def test_the_model_looks_at_the_instant_that_the_question_is_about(tmp_path):
    models, ratios = loaded_models(), []
    for index in range(40):
        seed = clip_seed("validation", index)
        scene = make_scene(seed)
        asked = [question for question in questions_of(seed, scene) if question.category == "Transient"]
        if not asked or len(ratios) == 3:
            continue
        path = tmp_path / f"{index}.mp4"
        encode_scene(path, scene, *CODECS[0][1:])
        compressor = Compressor.from_options(options_with(budget_tokens=200))
        compressor.models = models
        session = compressor.compress(path).open(models=models)
        evidence = session.find_evidence(Query(asked[0].question, asked[0].choices))
        thing = next(thing for thing in scene.things if thing.facts.get("role") == "transient")
        frames = thing.visible.nonzero()[0]
        instant = torch.tensor([frames[0] - 1, frames[-1] + 2], dtype=torch.float64) / scene.fps
        edges_s = frame_edges_s(session.tokens.frame_seconds)
        inside = share_of_interval(token_boxes(session.tokens), *frames_at(edges_s, instant).tolist())
        ratios.append(float((evidence.shares * inside).sum() / inside.mean()))
    assert len(ratios) == 3 and min(ratios) > 2, ratios


def test_spans_cover_the_clip_and_their_shares_add_up(bundle):
    document = run_freres("ask", bundle, "What moves?", "--where", "--json").json["where"]
    spans = document["spans"]
    assert 0 < document["visual_share"] <= 1 and 1 < len(spans) <= MAX_SPANS
    assert all(a["end_s"] == b["start_s"] for a, b in zip(spans, spans[1:], strict=False))
    assert spans[0]["start_s"] == 0 and spans[-1]["end_s"] == pytest.approx(2.0, abs=0.01)
    for key in ("share", "token_share"):
        assert sum(span[key] for span in spans) == pytest.approx(1, abs=1e-6)
    run = run_freres("ask", bundle, "What moves?", "--choices", "the red circle|nothing", "--where")
    assert "where the model looked" in run.out and run.out.count("of the tokens") == 3
    assert run_freres("ask", bundle, "What moves?", "--json").json["where"] is None


def test_no_span_is_made_by_rounding():
    """275 frames at 25 a second end an ulp after 11 s."""
    seconds = [i / 25 for i in range(275)]
    frames = np.zeros((275, 32, 32, 3), np.uint8)
    session = (
        Compressor(budget_tokens=10, models=loaded_models())
        .compress(frames, seconds=seconds)
        .open(models=loaded_models())
    )
    found = locate_evidence(session, Query("What moves?"))
    assert session.end_s > 11 and min(span["end_s"] - span["start_s"] for span in found["spans"]) > 0.4


@pytest.mark.parametrize(("window", "end_s"), [((), 4.0), (("--start", 1, "--end", 2.5), 2.5)])
def test_one_frame_lasts_as_long_as_inspect_says(tmp_path, window, end_s):
    bundle = tmp_path / "one.pt"
    clip = write_clip(tmp_path / "clip.mp4", 16, fps=4)
    run = run_freres("compress", clip, "--frames", 1, "--budget", 10, "-o", bundle, "--device", "cpu", *window)
    assert run.status == 0, run.err
    spans = run_freres("ask", bundle, "What moves?", "--where", "--json").json["where"]["spans"]
    edges_s = run_freres("inspect", bundle, "--json").json["over_time"]["edges_s"]
    assert [spans[0]["start_s"], spans[-1]["end_s"]] == pytest.approx([edges_s[0], edges_s[-1]])
    assert edges_s[-1] == pytest.approx(end_s) and edges_s[0] < end_s - 0.5


def test_the_answer_is_the_same_with_and_without(bundle):
    lines = [run_freres("ask", bundle, "What moves?", *flags).out for flags in ((), ("--where",))]
    assert lines[1].startswith(lines[0]) and len(lines[1]) > len(lines[0])
    assert run_freres("ask", bundle, "--where", stdin="What moves?\n").out == lines[1]


def test_a_family_with_a_running_state_says_why_not(bundle, monkeypatch, tmp_path):
    class Recurrent(Wrapped):
        keeps_state = True

    session = type("Session", (), {"model": Recurrent(loaded_models().language_model)})()
    assert "running state" in locate_evidence(session, Query("?"))
    monkeypatch.setattr("freres_cli.workflows.ask.why_no_evidence", lambda model: "cannot say where it looks")
    run = run_freres("ask", bundle, "What moves?", "--where")
    assert run.status == 0 and "note: --where: cannot say where it looks" in run.err and "looked" not in run.out
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"question": "?"}\n')
    check_failure(run_freres("ask", bundle, "--questions", rows, "--where"), 2, "--where")


def test_the_screen_gives_the_attention_of_a_span_first_and_then_its_share_of_the_tokens(capsys):
    span = {"start_s": 0.0, "end_s": 1.5, "share": 0.25, "token_share": 0.75}
    rest = {"start_s": 1.5, "end_s": 2.0, "share": 0.5, "token_share": 0.25}
    _print_spans({"visual_share": 0.4, "spans": [span, rest]})
    _, *shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown] == [
        ["50.0", "%", "1.50-2.00", "s,", "which", "has", "25.0", "%", "of", "the", "tokens"],
        ["25.0", "%", "0.00-1.50", "s,", "which", "has", "75.0", "%", "of", "the", "tokens"],
    ]
