"""A chat template is a program from a checkpoint: it may not run for ever, nor end freres with a traceback."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from freres_cli.backbones import templates
from freres_cli.backbones.templates import MAX_CHARACTERS, render_chat
from freres_cli.errors import ExitStatus
from tests.loaded_models import loaded_models
from tests.runner import fails

MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}]


@pytest.fixture
def language():
    return loaded_models().language_model


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_without_an_end_is_stopped(language, monkeypatch):
    monkeypatch.setattr(language.tokenizer, "chat_template", LOOPS)
    monkeypatch.setattr(templates, "LIMIT_S", 0.3)
    before, start = threading.active_count(), time.perf_counter()
    with fails(ExitStatus.BACKBONE, "chat template: not done"):
        language.prompt("what?")
    assert time.perf_counter() - start < 5 and threading.active_count() == before


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for a in range(9999) %}{{ 'x' * 999 }}{% endfor %}", f"at most {MAX_CHARACTERS} characters"),
    ],
)
def test_a_template_that_fails_is_one_error(language, monkeypatch, template, text):
    monkeypatch.setattr(language.tokenizer, "chat_template", template)
    with fails(ExitStatus.BACKBONE, text) as caught:
        language.prompt("what?")
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_may_not_take_all_memory(language, monkeypatch, template):
    monkeypatch.setattr(language.tokenizer, "chat_template", template)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with fails(ExitStatus.BACKBONE, "more than 1 GiB of memory"):
        language.prompt("what?")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content + 'x' }}", None])
def test_a_template_for_text_alone_gives_way_to_the_family_s_prompt(language, monkeypatch, template):
    monkeypatch.setattr(language.tokenizer, "chat_template", None)
    plain = language.prompt("what?")
    monkeypatch.setattr(language.tokenizer, "chat_template", template)
    assert render_chat(language.tokenizer, MESSAGES) is None and language.prompt("what?") == plain


def test_a_template_that_works_gives_what_transformers_gives(language, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}[{{ c.type }}]{% endfor %}{% endfor %}"
    monkeypatch.setattr(language.tokenizer, "chat_template", template)
    expected = language.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render_chat(language.tokenizer, MESSAGES) == expected == "<user>[video][text]"


@pytest.mark.parametrize(("is_command", "num_limits"), [(True, 2), (False, 1)])
def test_where_others_code_runs_memory_is_limited_until_a_template_has_kept_to_it(
    language, monkeypatch, is_command, num_limits
):
    own = f"{{% for m in messages %}}<{{{{ m.role }}}}> {is_command}{{% endfor %}}"
    monkeypatch.setattr(language.tokenizer, "chat_template", own)
    monkeypatch.setattr(templates, "is_command", lambda: is_command)
    limits, real = [], resource.setrlimit
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: (limits.append(limit), real(kind, limit)))
    assert (
        render_chat(language.tokenizer, MESSAGES) == render_chat(language.tokenizer, MESSAGES) == f"<user> {is_command}"
    )
    assert len(limits) == 2 * num_limits  # set, and put back


def test_two_threads_leave_the_limit_as_it_was():
    before = resource.getrlimit(resource.RLIMIT_AS)
    inside, second, left = threading.Event(), threading.Event(), threading.Event()

    def first():
        with templates._bounded_memory():
            inside.set()
            second.wait(0.3)  # one that is let in beside the first would take its limit for what was before
        left.set()

    def follow():
        inside.wait(10)
        with templates._bounded_memory():
            second.set()
            left.wait(10)

    threads = [threading.Thread(target=target) for target in (first, follow)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_template_that_leaves_the_video_out_is_not_used(monkeypatch):
    language = loaded_models().language_model
    monkeypatch.setattr(language.tokenizer, "chat_template", None)
    plain = language.prompt("what?")
    monkeypatch.setattr(language.tokenizer, "chat_template", "{{ messages[0]['content'][1]['text'] }}")
    assert language.prompt("what?") == plain
