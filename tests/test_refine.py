"""``ask --refine``: a question keeps the tokens of a bundle that it needs, each as it is, in a prefill of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from freres_cli import load_bundle
from freres_cli.baselines.registry import METHODS
from freres_cli.devices import choose_device
from freres_cli.pipeline import method_session
from freres_cli.pipeline.models import Models, make_source
from freres_cli.pipeline.query import Query
from freres_cli.pipeline.refining import embed_question, refine_tokens
from freres_cli.pipeline.session import AskRequest, open_session
from tests.loaded_models import CountingLanguageModel, loaded_models, models_with
from tests.pipeline_fixtures import BUDGET
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import fails, run_freres
from tests.tiny_families import FAMILY_CASES
from tests.token_checks import same_tokens

QUESTION, OTHER = "what moves?", "is the red square above the circle?"
DEEP = next(case for case in FAMILY_CASES if case.name == "qwen3_vl")


@pytest.fixture
def session(bundle):
    return open_session(AskRequest(bundle, choose_device("cpu")), loaded_models())


def without_times(answer):
    return replace(answer, ttft_s=None, tpot_s=None, notes=())


def test_kept_tokens_are_those_of_cdpruner_each_as_it_is(session):
    question = embed_question(session.model, QUESTION)
    ids = session.model.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert torch.equal(question, session.model.decoder.embed_tokens(torch.tensor(ids)))
    keep = METHODS["cdpruner"].pick_for_question(session.tokens.latents[:, : session.tokens.width], question, 40)
    refined = refine_tokens(session.tokens, session.model, QUESTION, 40)
    assert len(refined) == 40 and torch.equal(refined.latents, session.tokens.latents[keep])
    assert torch.equal(refined.positions, session.tokens.positions[keep])
    assert torch.equal(refined.seconds, session.tokens.seconds[keep])
    assert not torch.equal(refined.positions, refine_tokens(session.tokens, session.model, OTHER, 40).positions)
    same_tokens(refine_tokens(session.tokens, session.model, QUESTION, BUDGET), session.tokens)


def test_any_method_that_picks_for_a_question_is_asked_to(session, monkeypatch):
    """The method decides by what it declares, not by its name."""

    def pick_last(tokens, question, count):
        assert tokens.shape[1] == question.shape[1] == session.tokens.width
        return torch.arange(len(tokens) - count, len(tokens))

    own = replace(METHODS["cdpruner"], name="own", pick_for_question=pick_last)
    monkeypatch.setattr(method_session, "METHODS", {**METHODS, "own": own})
    clip = SimpleNamespace(full_tokens=session.full_tokens)
    made = method_session.open_method_session(clip, session.tokens, "own", 40, session.model, session.text_after)
    said = made.ask(QUESTION, max_new_tokens=8)
    kept = replace(session, tokens=session.tokens.pick(torch.arange(BUDGET - 40, BUDGET)))
    assert said.num_visual_tokens == 40 and said.text == kept.ask(QUESTION, max_new_tokens=8).text


def test_deepstack_rows_stay_with_their_tokens(clip, tmp_path):
    DEEP.make(tmp_path / "model")
    models = Models(make_source(str(tmp_path / "model"), "cpu"))
    path, flags = tmp_path / "b.pt", ("--frames", 4, "--set", "grid=4x5", "--budget", 60)
    assert run_freres("compress", clip, "--model", tmp_path / "model", *flags, "-o", path).status == 0
    session = open_session(AskRequest(path, choose_device("cpu")), models)
    refined = refine_tokens(session.tokens, session.model, QUESTION, 9)
    assert refined.latents.shape == (9, refined.width * (1 + DEEP.num_deep))
    rows = [tuple(row) for row in session.tokens.latents.tolist()]
    assert all(tuple(row) in rows for row in refined.latents.tolist())
    assert session.ask(QUESTION, refine=9, max_new_tokens=2).num_visual_tokens == 9


@pytest.mark.parametrize("refine", [BUDGET, BUDGET + 1, 10**6])
@pytest.mark.parametrize("choices", [(), ("a circle", "a square")])
def test_with_all_tokens_kept_the_answer_is_that_of_the_bundle(session, refine, choices):
    plain = session.ask(QUESTION, choices=choices)
    asked = session.ask(QUESTION, choices=choices, refine=refine)
    assert without_times(asked) == without_times(plain)
    assert session.refine_s == 0 and len(session._prefixes) == 1  # the bundle's own prefill, not one like it
    assert asked.notes == (*plain.notes, f"refine {refine}: the video has {BUDGET} tokens, so all are kept")


def test_each_question_has_its_own_prefill_and_the_bundle_keeps_its_own(bundle):
    counting = CountingLanguageModel(loaded_models().language_model)
    session = open_session(AskRequest(bundle, choose_device("cpu")), models_with(language_model=counting))
    counting.num_video_tokens.clear()
    plain = session.ask(QUESTION)
    first, again = (session.ask(QUESTION, refine=25) for _ in range(2))
    assert counting.num_video_tokens == [BUDGET, 25, 25]
    assert without_times(first) == without_times(again) and first.num_visual_tokens == 25
    assert first.num_context_tokens == plain.num_context_tokens - BUDGET + 25
    assert again.ttft_s > session.prefill_s + session.refine_s > session.refine_s > 0
    assert any("refine: 25 of 300" in note for note in first.notes)
    assert without_times(session.ask(QUESTION)) == without_times(plain) and session.refine_s == 0
    assert counting.num_video_tokens == [BUDGET, 25, 25]


def test_several_questions_are_answered_as_one_at_a_time(session):
    queries = [Query(QUESTION), Query(OTHER, ("yes", "no")), Query(OTHER)]
    singles = [session.ask(q.question, choices=q.choices, refine=25, max_new_tokens=4) for q in queries]
    told = []
    many = session.ask_many(queries, refine=25, max_new_tokens=4, on_answer=lambda place, answer: told.append(place))
    assert list(map(without_times, many)) == list(map(without_times, singles)) and told == [0, 1, 2]
    whole = session.ask_many([QUESTION, OTHER], refine=BUDGET)
    assert [answer.text for answer in whole] == [answer.text for answer in session.ask_many([QUESTION, OTHER])]
    assert all("all are kept" in answer.notes[-1] for answer in whole)


def test_the_command_tells_how_many_tokens_are_kept(bundle, tmp_path):
    run = run_freres("ask", bundle, QUESTION, "--refine", 30, "--json", "--max-new-tokens", 2)
    assert run.json["visual_tokens"] == run.json["refined_tokens"] == 30
    assert any("30 of 300 tokens" in note for note in run.json["notes"])
    plain, whole = (run_freres("ask", bundle, QUESTION, "--json", *f).json for f in ((), ("--refine", BUDGET)))
    assert plain["refined_tokens"] is whole["refined_tokens"] is None and whole["visual_tokens"] == BUDGET
    assert plain["answer"] == whole["answer"] and plain["text_overhead_tokens"] == whole["text_overhead_tokens"]
    single = run_freres("ask", bundle, QUESTION, "--refine", 30)
    looped = run_freres("ask", bundle, "--refine", 30, stdin=f"{QUESTION}\n{QUESTION}\n")
    assert single.status == 0 and looped.out == 2 * single.out and looped.err.count("30 of 300 tokens") == 2
    rows = tmp_path / "q.jsonl"
    rows.write_text("".join(json.dumps({"question": q}) + "\n" for q in (QUESTION, OTHER)))
    listed = run_freres("ask", bundle, "--questions", rows, "--refine", 30)
    assert listed.out.splitlines()[0] == single.out.strip() and "2 questions, a prefill for each" in listed.err
    answers = run_freres("ask", bundle, "--questions", rows, "--refine", 30, "--json").out.splitlines()
    assert [json.loads(line)["refined_tokens"] for line in answers] == [30, 30]


def test_a_number_of_tokens_below_one_is_refused(bundle, session):
    refused = run_freres("ask", bundle, QUESTION, "--refine", 0)
    assert refused.status == 2 and "--refine" in refused.err and refused.out == ""
    for wrong in (0, -3):
        with fails(2, "refine: expected at least 1"):
            session.ask(QUESTION, refine=wrong)
    with fails(2, "refine: expected a whole number"):
        session.ask_many([QUESTION], refine=2.5)


def test_the_python_api_refines(bundle):
    assert load_bundle(bundle).open(models=loaded_models()).ask(QUESTION, refine=12).num_visual_tokens == 12


def test_notes_on_answers_to_a_file_are_those_of_one_question(bundle, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "what moves?", "choices": ["a", "b"]}) + "\n")
    notes = run_freres("ask", bundle, "what moves?", "--choices", "a|b", "--refine", 99999, "--json").json["notes"]
    run = run_freres("ask", bundle, "--questions", file, "--refine", 99999)
    assert any("refine" in note for note in notes) and all(f"note: {note}\n" in run.err for note in notes)
