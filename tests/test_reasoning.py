"""Models that reason before they answer: the template is asked not to, and no answer is read from reasoning."""

from __future__ import annotations

import pytest

from freres_cli.pipeline.query import Query
from freres_cli.pipeline.reasoning import NOTE, opens_reasoning
from freres_cli.pipeline.session import AskRequest, open_session
from tests.evaluations import run_eval, write_clips, write_questions
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import CPU, bundle, clip
from tests.runner import fails

__all__ = ["bundle", "clip"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
# As Qwen3.5 has it, and as a checkpoint that always reasons.
MAY = (
    CHAT
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
ALWAYS = CHAT + "<think>\n"


@pytest.fixture
def language(monkeypatch):
    """The bundled language model, and a way to give it another template."""
    model = loaded_models().language_model

    def use(template):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        return model

    return use


def test_a_template_that_may_reason_is_asked_not_to(language):
    model = language(MAY)
    assert model.tokenizer.decode(list(model.prompt("what?").suffix)).endswith("<think>\n\n</think>\n\n")
    assert not opens_reasoning(model) and opens_reasoning(language(ALWAYS)) and not opens_reasoning(language(None))


def test_a_model_that_always_reasons_answers_freely_with_a_note_and_chooses_nothing(language, bundle):
    language(ALWAYS)
    session = open_session(AskRequest(bundle, CPU), loaded_models())
    assert NOTE in session.notes and session.ask("what?", max_new_tokens=2).num_new_tokens
    for ask in (lambda q: session.ask(q.question, choices=q.choices), lambda q: session.ask_many([q])):
        with fails(5, "choices: the prompt of bundled opens a block of reasoning"):
            ask(Query("what?", ("a", "b")))
    language(MAY)
    assert NOTE not in open_session(AskRequest(bundle, CPU), loaded_models()).notes
    assert session.ask("what?", choices=("a", "b")).text in ("a", "b")


def test_nothing_is_scored_by_reasoning(language, tmp_path):
    questions = write_questions(write_clips(tmp_path))
    language(ALWAYS)
    with fails(5, "eval: the prompt of bundled opens a block of reasoning"):
        run_eval(questions, "uniform", "0.5")
