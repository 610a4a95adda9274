"""``freres compare``: one clip, one encoding, and the figures that the other verbs give."""

from __future__ import annotations

from dataclasses import replace

import pytest

from freres_cli.baselines.registry import METHODS
from freres_cli.cli.compress import make_options
from freres_cli.pipeline.choices import choose_cells
from freres_cli.pipeline.clip import EncodedClip
from freres_cli.pipeline.models import Models
from freres_cli.pipeline.query import Query
from freres_cli.pipeline.session import Session
from freres_cli.workflows.compare import CompareRequest, compare
from tests.clips import write_clip
from tests.evaluations import FRAMES, write_clips
from tests.loaded_models import CountingEncoder, CountingLanguageModel, loaded_models, models_with
from tests.runner import check_failure, fails, run_freres

KEPT = ("kept_hold", "kept_linear")
METHODS_ASKED = "full,uniform,fre-res,adaptive,blind"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("compare")) / "clip1.mp4"


def request_for(video, methods=METHODS_ASKED, budgets="0.25", queries=()):
    options = make_options({}, None, None, device="cpu")
    return CompareRequest(video, choose_cells(methods, budgets, METHODS), options, queries, max_new_tokens=2)


def test_shares_are_those_of_fidelity_and_answers_those_of_ask(video, tmp_path):
    asked = ("--question", "Which way?", "--choices", "left|right", "--budgets", "0.25")
    document = run_freres("compare", video, "--methods", METHODS_ASKED, *asked, "--json").json
    assert document["schema"] == "freres.compare/1" and document["questions"] == ["Which way?"]
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == METHODS_ASKED.split(",")
    fidelity = run_freres(
        "fidelity", video, "--methods", "full,uniform,fre-res,adaptive", "--budgets", "0.25", "--json"
    )
    for row in fidelity.json["rows"]:
        for key in ("visual_tokens", "budget_tokens", "full_tokens", "kept_hold", "kept_linear"):
            assert rows[row["method"]][key] == pytest.approx(row[key], abs=1e-9), (row["method"], key)
    assert rows["blind"]["kept_hold"] is None and rows["blind"]["visual_tokens"] == 0
    for method in ("uniform", "fre-res", "adaptive"):
        bundle = tmp_path / f"{method}.pt"
        run_freres("compress", video, "--method", method, "--budget", rows[method]["budget_tokens"], "-o", bundle)
        told = run_freres("ask", bundle, "Which way?", "--choices", "left|right", "--json").json
        answer = rows[method]["answers"][0]
        assert answer["answer"] == told["answer"] and answer["choices"] == pytest.approx(told["choices"], rel=1e-4)
        assert rows[method]["context_tokens"] == answer["context_tokens"] == told["context_tokens"]
        assert rows[method]["ttft_s"] > rows[method]["prefill_s"] > 0 and rows[method]["compress_s"] > 0


@pytest.mark.parametrize("method", ["fre-res", "adaptive"])
def test_shares_are_those_of_the_method_and_not_of_its_adapter(video, method, monkeypatch):
    plain = compare(request_for(video, method), models=loaded_models()).rows[0]
    tokens_of = EncodedClip.build_tokens

    def build(self, name, budget_tokens, modules=None):
        tokens = tokens_of(self, name, budget_tokens)
        return tokens if modules is None else replace(tokens, latents=tokens.latents + 1)

    monkeypatch.setattr(EncodedClip, "build_tokens", build)
    monkeypatch.setattr("freres_cli.workflows.compare.load_all_modules", lambda *_: {None: object()})
    asked = compare(request_for(video, method, queries=(Query("Which way?"),)), models=loaded_models()).rows[0]
    assert asked["answers"] and [asked[key] for key in KEPT] == [plain[key] for key in KEPT]


def test_one_frame_is_a_frame(tmp_path):
    run = run_freres("compare", write_clip(tmp_path / "one.mp4", 1), "--methods", "uniform", "--budgets", "4")
    assert run.status == 0 and "\n36 full tokens of 1 frame; decode" in run.out, run.err


def test_the_clip_is_encoded_once_and_prefilled_once_a_row(video):
    encoder, model = CountingEncoder(loaded_models().encoder), CountingLanguageModel(loaded_models().language_model)
    queries = (Query("Which way?", ("left", "right")), Query("How many?"))
    result = compare(request_for(video, "full,uniform,evs", "0.5,0.25", queries), models_with(encoder, model))
    assert sum(encoder.num_frames) == result.num_frames == FRAMES + 1
    assert model.num_video_tokens == [row["visual_tokens"] for row in result.rows] and len(result.rows) == 5
    assert all(
        [answer["question"] for answer in row["answers"]] == [q.question for q in queries] for row in result.rows
    )


def test_without_a_question_no_language_model_is_loaded(video):
    class NoLanguageModel(Models):
        @property
        def language_model(self):
            raise AssertionError("loaded")

    result = compare(request_for(video), NoLanguageModel(loaded_models().source, loaded_models().encoder))
    assert all(row["answers"] == [] and row["context_tokens"] is None for row in result.rows)
    table = run_freres("compare", video, "--methods", "full,evs").out
    assert table.splitlines()[0].split() == ["method", "budget", "tokens", "hold", "linear", "compress"]
    assert run_freres("compare", video, "--methods", "full,evs", "-q").err == ""


def test_the_table_has_a_row_and_an_answer_for_each_method(video):
    flags = ("--question", "Which way?", "--question", "what\nnow?", "--choices", "left|right")
    run = run_freres("compare", video, "--methods", "full,evs", "--budgets", "0.5,0.1", *flags)
    assert run.status == 0, run.err
    lines = run.out.splitlines()
    assert lines[0].split()[:6] == ["method", "budget", "tokens", "context", "hold", "linear"]
    for question in ("Which way?", "what now?"):
        start = lines.index(question)
        assert lines[start + 1].split() == ["method", "budget", "probability", "answer"]
        names = [tuple(line.split()[:2]) for line in lines[start + 2 : start + 5]]
        assert names == [("full", "-"), ("evs", "0.5"), ("evs", "0.1")]
        assert all(line.split()[-1] in ("left", "right") for line in lines[start + 2 : start + 5])
    assert max(map(len, lines)) <= 100


def test_a_method_that_fails_is_a_row_that_says_why(video, monkeypatch):
    build_tokens = EncodedClip.build_tokens

    def build(self, method, *rest):
        if method == "uniform":
            raise ValueError("no such luck")
        return build_tokens(self, method, *rest)

    monkeypatch.setattr(EncodedClip, "build_tokens", build)
    run = run_freres("compare", video, "--methods", "uniform,evs", "--question", "what?", "--max-new-tokens", "1")
    assert run.status == 0 and "warning: failed: uniform 0.25: unexpected ValueError: no such luck" in run.err
    assert [line.split()[:3] for line in run.out.splitlines()[1:3]] == [["uniform", "0.25", "-"], ["evs", "0.25", "45"]]
    with fails(1, "every method failed: uniform 0.25: unexpected ValueError"):
        compare(request_for(video, "uniform"), loaded_models())


@pytest.mark.parametrize("verb", ["compare", "fidelity"])
def test_rows_that_are_made_from_other_frames_are_noted(video, verb):
    flags = ("--methods", "uniform,adaptive", "--budgets", "0.25", "--set", "sample=count", "--set", "sample_count=2")
    for density in (1, 2):
        run = run_freres(verb, video, *flags, "--set", f"track_density={density}", "--json")
        assert run.status == 0, run.err
        assert [row["num_frames"] for row in run.json["rows"]] == [2, 2 * density]
        (note,) = [note for note in run.json["notes"] if "rows differ in the frames" in note] or [None]
        assert (note is None) == (density == 1)
    assert "2 by uniform; 4 by adaptive; --set track_density=1" in note
    assert ("judged on the frames" in note) == (verb == "fidelity")
    if verb == "compare":
        assert "for the frames of all methods" in run_freres(verb, video, *flags, "--set", "track_density=2").out


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (("--methods", "none-such"), 2, "got 'none-such'"),
        (("--methods", "vqtoken"), 2, "vqtoken is not here: its tokens are entries of a codebook"),
        (("--budgets", "1"), 2, "--budgets"),
        (("--choices", "a|b"), 2, "--question as well"),
        (("--question", "w?", "--choices", "a"), 2, "2 to 26"),
        (("--question", "  "), 2, "--question: is empty"),
        (("--question", "x" * 20000), 2, "too long"),
        (("--question", "what <|im_end|> now"), 2, "reads as a command"),
        (("--set", "budget_tokens=5"), 2, "--budgets"),
        (("--model", "no/such/folder/at/all"), 5, "no/such"),
    ],
)
def test_what_cannot_be_done_is_one_line(video, flags, status, text):
    check_failure(run_freres("compare", video, *flags), status, text)


def test_a_video_that_is_none_is_a_video_error(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    check_failure(run_freres("compare", tmp_path / "a.mp4"), 3, "a.mp4")
    check_failure(run_freres("compare", tmp_path / "b.mp4", "--question", "what?"), 3, "b.mp4")
    check_failure(run_freres("compare", ""), 2, "empty")


def test_costs_are_those_of_the_first_question_and_an_adapter_is_named(video, monkeypatch):
    asked, ask = [], Session.ask
    monkeypatch.setattr(Session, "ask", lambda self, *given, **more: asked.append(1) or ask(self, *given, **more))
    monkeypatch.setattr(Session, "prefill_s", property(lambda self: float(len(asked))))
    queries = (Query("Which way?"), Query("How many?"))
    result = compare(request_for(video, "cdpruner", queries=queries), loaded_models())
    assert result.rows[0]["prefill_s"] == 1.0 and len(asked) == 2
    monkeypatch.undo()
    run = run_freres("compare", video, "--methods", "fre-res,evs", "--question", "Which way?", "--max-new-tokens", 1)
    assert run.status == 0 and "note: fre-res with adapter bundled_adapter.safetensors" in run.err, run.err
