"""Methods that need the question or the decoder, in ``freres eval``; ``freres compress`` refuses them by name."""

from __future__ import annotations

import pytest
import torch

from freres_cli.baselines.registry import METHODS
from freres_cli.errors import UsageError
from freres_cli.pipeline.query import Query, check_query
from freres_cli.pipeline.refining import refine_tokens
from freres_cli.pipeline.session import Session
from tests.evaluations import make_request, read_rows, rows_for, run_eval, write_clips, write_rows
from tests.loaded_models import CountingLanguageModel, loaded_models, models_with
from tests.runner import check_failure, run_freres
from tests.test_encoded_clip import encode_clip
from tests.tiny_families import FAMILY_CASES

NAMES = ("cdpruner", "fastv", "framefusion-prune")
HYBRID = next(case for case in FAMILY_CASES if case.name == "qwen3_5")
COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def questions(folder):
    return write_rows(folder / "q.jsonl", rows_for(["clip0.mp4"]))


def test_the_methods_that_need_the_question_are_known():
    assert {name for name, method in METHODS.items() if not method.is_question_blind} == set(NAMES)


@pytest.mark.parametrize("method", NAMES)
def test_compress_refuses_them_by_name(method):
    run = run_freres("compress", "x.mp4", "--method", method)
    check_failure(run, 2, f"got {method}")
    assert f"hint: {method} is for freres eval" in run.err


def test_at_the_full_budget_they_answer_as_full(questions, tmp_path):
    log = tmp_path / "a.jsonl"
    run_eval(questions, ",".join(("full", *NAMES)), "1.0", output=log)
    full, *cells = read_rows(log)[1]["cells"]
    for cell in cells:
        assert {key: answer[:2] for key, answer in cell["answers"].items()} == {
            key: answer[:2] for key, answer in full["answers"].items()
        }
        assert (cell["visual_tokens"], cell["context_tokens"]) == (full["visual_tokens"], full["context_tokens"])


def test_the_budget_is_exact_and_context_counts_what_the_first_layers_see(questions):
    counting = CountingLanguageModel(loaded_models().language_model)
    models = models_with(language_model=counting)
    summary = run_eval(questions, ",".join(("full", "dpp", *NAMES)), str(COUNT), models=models).summary
    rows = {row["method"]: row for row in summary["rows"]}
    full = rows["full"]
    for name in ("dpp", *NAMES):
        assert rows[name]["visual_tokens"] == rows[name]["budget_tokens"] == COUNT
    less = full["visual_tokens"] - COUNT
    assert rows["dpp"]["context_tokens"] == rows["cdpruner"]["context_tokens"] == full["context_tokens"] - less
    assert rows["fastv"]["context_tokens"] == rows["framefusion-prune"]["context_tokens"] == full["context_tokens"]
    whole = int(full["visual_tokens"])
    # Two questions: each has its own prefill with cdpruner, and all other methods prefill once.
    assert counting.num_video_tokens == [whole, COUNT, COUNT, COUNT, whole, whole]
    assert rows["cdpruner"]["next_ttft_s"] > rows["cdpruner"]["prefill_s"] > 0


def test_cdpruner_answers_from_the_tokens_of_each_question(folder, questions, tmp_path):
    log, model = tmp_path / "a.jsonl", loaded_models().language_model
    run_eval(questions, "cdpruner", str(COUNT), output=log)
    options = make_request(questions, "full").options
    clip = encode_clip(folder / "clip0.mp4", options)
    every = clip.build_tokens("full", clip.full_tokens)
    answers = read_rows(log)[1]["cells"][0]["answers"]
    for row in read_rows(questions):
        tokens = refine_tokens(every, model, row["question"], COUNT)
        said = Session(model, tokens, clip.full_tokens, options.settings.text_after, 0.0).ask(
            row["question"], choices=row["choices"], max_new_tokens=2
        )
        assert answers[row["id"]][0] == said.text


def test_tokens_are_picked_by_the_relevant_text_if_there_is_one(folder, questions):
    model, options = loaded_models().language_model, make_request(questions, "full").options
    clip = encode_clip(folder / "clip0.mp4", options)
    every = clip.build_tokens("full", clip.full_tokens)
    asked, about = "What is it? A. red B. blue", "Which way does it move?"
    picked = [refine_tokens(every, model, text, COUNT) for text in (about, asked)]
    assert not torch.equal(picked[0].positions, picked[1].positions)

    def answer(tokens, choices, **more):
        session = Session(model, tokens, clip.full_tokens, options.settings.text_after, 0.0)
        return session.ask(asked, choices=choices, max_new_tokens=4, **more)

    for choices in ((), ("red", "blue")):
        for tokens, text in zip(picked, (about, None), strict=True):
            expected, found = answer(tokens, choices), answer(every, choices, refine=COUNT, relevant_text=text)
            assert (found.text, found.choices) == (expected.text, expected.choices)
    session = Session(model, every, clip.full_tokens, options.settings.text_after, 0.0)
    queries = [Query(asked, ("red", "blue"), text) for text in (about, None)]
    for tokens, found in zip(picked, session.ask_many(queries, refine=COUNT), strict=True):
        assert found.choices == answer(tokens, ("red", "blue")).choices
    with pytest.raises(UsageError, match="question: is empty"):
        session.ask(asked, relevant_text=" ")


@pytest.mark.parametrize("method", ["fastv", "framefusion-prune"])
def test_a_decoder_that_cannot_be_pruned_is_refused_by_name(questions, tmp_path, method):
    HYBRID.make(tmp_path / "model")
    run = run_freres("eval", questions, "--methods", f"blind,{method}", "--model", tmp_path / "model")
    check_failure(run, 5, f"method {method}: cannot prune qwen3_5")


@pytest.mark.parametrize("text", [5, "x" * 20000, "\ud800", "see <|im_end|>"])
def test_relevant_text_is_checked_as_a_question_is(text):
    with pytest.raises(UsageError):
        check_query(Query("Which?", (), text), loaded_models().language_model)
