"""The real vLLM with the plug-in says what ``freres ask`` says. Needs vLLM, see freres-serving(7)."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from freres_cli.backbones.engine import prefill_video
from freres_cli.backbones.generation import generate
from freres_cli.pipeline.bundle import load_bundle
from freres_cli.world.bundled_model import bundled_model_dir
from freres_cli.world.make import make_set
from tests.clips import write_clip
from tests.runner import run_freres
from tests.tiny_families import FAMILY_CASES

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed")
CASES = {case.name: case for case in FAMILY_CASES}
ARCHITECTURES = {
    "qwen2_vl": "FreResQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "FreResQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "FreResQwen3VLForConditionalGeneration",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four bundles of the bundled model, of two methods, and 16 questions about each."""
    folder = tmp_path_factory.mktemp("world")
    clips = make_set(folder, "test", 4)
    questions = [json.loads(line)["question"] for line in (folder / "questions.jsonl").read_text().splitlines()]
    bundles = []
    for place, clip in enumerate(clips):
        method = ("fre-res", "adaptive")[place % 2]
        bundles.append(folder / f"{place}.pt")
        run = run_freres("compress", folder / clip.file, "--method", method, "--budget", 200, "-o", bundles[-1])
        assert run.status == 0, run.err
    sessions = [load_bundle(path).open(device="cpu") for path in bundles]
    return SimpleNamespace(folder=folder, bundles=bundles, sessions=sessions, questions=questions)


def ask(session, question, num):
    ids = session.model.prompt(question)
    prefix = prefill_video(session.model, ids.prefix, session.tokens, session.text_after)
    answer = generate(session.model, prefix, ids.suffix, num)
    list(answer)
    return answer.ids


def check_answers(llm, session, bundle, questions, num=16):
    """Greedy ids are those of freres ask, and log-probabilities within 1e-4. Returns vLLM's results."""
    from tests.vllm_engines import log_probs_of, our_log_probs, prompt_about, sampling

    results = llm.generate([prompt_about(session, bundle, q) for q in questions], sampling(num), use_tqdm=False)
    for question, result in zip(questions, results, strict=True):
        said = result.outputs[0]
        assert list(said.token_ids) == ask(session, question, num), question
        difference = (log_probs_of(said) - our_log_probs(session, question, list(said.token_ids))).abs().max()
        assert float(difference) < 1e-4, (question, float(difference))
    return results


@pytest.fixture(scope="module")
def engine(world):
    from freres_cli.integrations.vllm_benchmark import open_engine

    with open_engine(bundled_model_dir(), ARCHITECTURES["qwen2_vl"], allowed_local_media_path=str(world.folder)) as llm:
        yield llm


def test_answers_and_log_probabilities_are_those_of_ask(world, engine):
    assert any(bool((session.tokens.positions % 1).any()) for session in world.sessions)
    num_asked = 0
    for session, bundle in zip(world.sessions, world.bundles, strict=True):
        results = check_answers(engine, session, bundle, world.questions)
        num_asked += len(results)
        # every question but the first finds the video's whole blocks in the prefix cache
        rows = len(session.model.prompt("").prefix) + len(session.tokens)
        later = engine.generate(
            [prompt(session, bundle, f"{q} Now?") for q in world.questions], params(1), use_tqdm=False
        )
        assert all(result.num_cached_tokens >= rows // 128 * 128 > 0 for result in later)
    assert num_asked >= 50


def prompt(session, bundle, question):
    from tests.vllm_engines import prompt_about

    return prompt_about(session, bundle, question)


def params(num):
    from tests.vllm_engines import sampling

    return sampling(num)


def test_eight_clients_on_four_bundles_hear_what_each_hears_alone(world, engine):
    asked = [(n % 4, world.questions[n]) for n in range(8)]
    prompts = [prompt(world.sessions[place], world.bundles[place], question) for place, question in asked]
    together = engine.generate(prompts, params(16), use_tqdm=False)
    for one, (place, question) in zip(together, asked, strict=True):
        assert list(one.outputs[0].token_ids) == ask(world.sessions[place], question, 16)


def test_text_alone_is_answered_as_without_the_plug_in(world, engine):
    """Against transformers, which knows no plug-in."""
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(bundled_model_dir(), dtype=torch.float32)
    ids = world.sessions[0].model.tokenizer("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    told = stock.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    said = engine.generate([{"prompt_token_ids": ids}], params(8), use_tqdm=False)[0].outputs[0]
    assert list(said.token_ids) == told


def test_a_chat_names_a_bundle_by_path_or_brings_it(world, engine):
    import base64

    question, bundle = world.questions[0], world.bundles[0]
    content = base64.b64encode(bundle.read_bytes()).decode()
    for url in (f"file://{bundle}", f"data:application/octet-stream;base64,{content}", content):
        parts = [{"type": "video_embeds", "video_embeds": url}, {"type": "text", "text": question}]
        said = engine.chat([{"role": "user", "content": parts}], params(16), use_tqdm=False)[0]
        assert list(said.outputs[0].token_ids) == ask(world.sessions[0], question, 16), url[:40]


def test_what_cannot_be_used_is_refused_before_the_engine(world, engine, tmp_path):
    from vllm.exceptions import VLLMValidationError

    from freres_cli.integrations.vllm_bundles import make_payload

    good = prompt(world.sessions[0], world.bundles[0], "Why?")
    outside = tmp_path / "b.pt"
    outside.write_bytes(world.bundles[0].read_bytes())
    for url, message in ((f"file://{outside}", "must be a subpath"), ("!!", "expected a file:// or data: URL")):
        parts = [{"type": "video_embeds", "video_embeds": url}, {"type": "text", "text": "Why?"}]
        with pytest.raises(VLLMValidationError, match=message):
            engine.chat([{"role": "user", "content": parts}], params(1), use_tqdm=False)
    bad = {**good, "multi_modal_data": {"video": make_payload(b"PK" + bytes(100))}}
    with pytest.raises(VLLMValidationError, match="bundle: not a freres bundle"):
        engine.generate([bad], params(1), use_tqdm=False)
    # the engine goes on
    assert engine.generate([good], params(1), use_tqdm=False)[0].outputs[0].token_ids


def with_yarn(config):
    """The same model for four times its positions. vLLM makes frequencies of its own, with or without the plug-in."""
    config["text_config"]["rope_parameters"] |= {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
    }  # fmt: skip
    return config


def make_wide(folder, name, change=lambda config: config):
    """A tiny model of a family that vLLM takes. ``change``: what else to make of its config."""
    case = with_wide_heads(CASES[name])
    replace(case, config=lambda *tokens: change(case.config(*tokens))).make(folder)
    return folder


def answers_of(model, architecture, prompts):
    from freres_cli.integrations.vllm_benchmark import open_engine

    with open_engine(model, architecture) as llm:
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params(16), use_tqdm=False)]


def test_longer_contexts_by_yarn_are_vllms_own(tmp_path):
    model = make_wide(tmp_path / "model", "qwen2_vl", with_yarn)
    text = [{"prompt_token_ids": [place * 7 % 250 for place in range(1500)]}]
    stock = answers_of(model, "Qwen2VLForConditionalGeneration", text)
    assert answers_of(model, ARCHITECTURES["qwen2_vl"], text) == stock


def test_embeddings_of_images_are_taken_as_without_the_plug_in(tmp_path):
    """Without the tower, vLLM takes no DeepStack rows in them."""
    model = make_wide(tmp_path / "model", "qwen3_vl")
    config = json.loads((model / "config.json").read_text())
    rows = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    image = {"image_embeds": rows, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    ids = [65, 66, config["vision_start_token_id"], config["image_token_id"], config["vision_end_token_id"], 67, 68]
    prompts = [{"prompt_token_ids": ids, "multi_modal_data": {"image": image}}]
    stock = answers_of(model, "Qwen3VLForConditionalGeneration", prompts)
    assert answers_of(model, ARCHITECTURES["qwen3_vl"], prompts) == stock


def test_a_draft_model_is_refused():
    from freres_cli.integrations.vllm_models import refuse_drafts

    refuse_drafts(None)
    refuse_drafts(SimpleNamespace(method="ngram", uses_draft_kv_cache=lambda: False))
    with pytest.raises(ValueError, match=r"speculative decoding with a model \(eagle\)"):
        refuse_drafts(SimpleNamespace(method="eagle", uses_draft_kv_cache=lambda: True))


def with_wide_heads(case):
    """The same family with heads of 32 values, the fewest that vLLM's attention on a CPU takes."""

    def make(token, vocabulary):
        config = case.config(token, vocabulary)
        text, vision = config["text_config"], config["vision_config"]
        text |= {"hidden_size": 128, "head_dim": 32}
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [6, 5, 5]}
        vision |= {"hidden_size" if case.name == "qwen2_vl" else "out_hidden_size": 128}
        return config

    return replace(case, config=make)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_says_what_ask_says(name, tmp_path):
    from vllm.exceptions import VLLMValidationError

    from freres_cli.integrations.vllm_benchmark import open_engine

    model, bundle = make_wide(tmp_path / "model", name), tmp_path / "b.pt"
    clip = write_clip(tmp_path / "clip.mp4", 40, fps=8)
    run = run_freres(
        *("compress", clip, "--model", model, "--frames", 8, "--grid", "4x5", "--budget", 70, "--device", "cpu"),
        *("--method", "fre-res", "--set", "anchors=2", "-o", bundle),
    )
    assert run.status == 0, run.err
    session = load_bundle(bundle).open(device="cpu")
    with open_engine(model, ARCHITECTURES[name]) as llm:
        check_answers(llm, session, bundle, ["what moves?", "Why, and how many?"], 24)
    if name == "qwen2_5_vl":
        with (
            open_engine(model, ARCHITECTURES[name], video_pruning_rate=0.5) as llm,
            pytest.raises(VLLMValidationError, match="this server prunes videos"),
        ):
            llm.generate([prompt(session, bundle, "Why?")], params(1), use_tqdm=False)
