"""``freres verify``: every law on every family, and a broken path of ours that it must see."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch

from freres_cli.backbones import language, qwen3_vl, sizes, stock, vision
from freres_cli.backbones.frame_runs import FrameRunLanguageModel
from freres_cli.backbones.stock_processors import stock_pixels
from freres_cli.pipeline.models import Models, make_source
from freres_cli.workflows import verify
from tests.family_contract import folders as folders
from tests.family_contract import one_thread as one_thread
from tests.runner import check_failure, fails, run_freres
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import make_qwen2_vl

CASES = {case.name: case for case in FAMILY_CASES}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CASES), ("qwen3_vl_moe", "bfloat16"), ("smolvlm", "float16")]
)
def test_every_law_holds_for_every_family(folders, name, dtype):
    run = run_freres("verify", folders(name), "--device", "cpu", "--dtype", dtype, "--json")
    assert run.status == 0, run.err
    document = run.json
    assert (document["schema"], document["family"], document["dtype"]) == ("freres.verify/1", name, dtype)
    laws = {law["name"]: law for law in document["laws"]}
    assert list(laws) == list(verify.LAWS)
    for law in laws.values():
        is_left_out = CASES[name].is_hybrid and law["name"] == "subset"
        assert law["state"] == ("not run" if is_left_out else "holds")
        assert bool(law["reason"]) or not is_left_out
        assert is_left_out or law["difference"] <= law["tolerance"]
    # On the CPU with PyTorch's kernels nothing but the masked pass may differ at all.
    assert [laws[name]["difference"] for name in ("pixels", "latents", "prompt", "logits")] == [0.0] * 4
    assert laws["logits"]["tolerance"] < 1.0


def test_the_bundled_model_is_the_default():
    run = run_freres("verify", "--device", "cpu")
    assert run.status == 0, run.err
    rows = [line.split()[:2] for line in run.out.splitlines()]
    assert [[name, "holds"] for name in verify.LAWS] == rows[1:7]
    assert "qwen2_vl in float32 on CPU" in run.out


def break_position(monkeypatch):
    """Visual tokens one step later than they are."""
    real, in_frame = language.DecoderLanguageModel.visual_rows, FrameRunLanguageModel.axes_in_frame
    monkeypatch.setattr(
        language.DecoderLanguageModel,
        "visual_rows",
        lambda self, piece, index, axes, after: real(self, piece, index, axes + 1, after),
    )
    monkeypatch.setattr(FrameRunLanguageModel, "axes_in_frame", lambda self, *given: in_frame(self, *given) + 1)


def break_next_position(monkeypatch):
    """The text after the video one step later than it is."""
    real = language.DecoderLanguageModel.splice

    def splice(self, *arguments):
        rows = real(self, *arguments)
        return replace(rows, next_position=rows.next_position + 1)

    monkeypatch.setattr(language.DecoderLanguageModel, "splice", splice)


def break_decoder_weight(monkeypatch):
    """One number of one matrix, as a bit that flipped."""
    real = language.load_submodule

    def load(checkpoint, module, *rest):
        real(checkpoint, module, *rest)
        matrix = next(p for name, p in module.named_parameters() if name.endswith("down_proj.weight"))
        matrix[0, 0] += 1.0

    monkeypatch.setattr(language, "load_submodule", load)


def break_tower_weight(monkeypatch):
    real = vision.load_submodule

    def load(checkpoint, module, *rest):
        real(checkpoint, module, *rest)
        next(p for p in module.parameters() if p.ndim > 1)[0] *= 1.01

    monkeypatch.setattr(vision, "load_submodule", load)


def break_pixels(monkeypatch):
    monkeypatch.setattr(
        vision.PixelRule, "normalize", lambda self, frames, real=vision.PixelRule.normalize: real(self, frames) * 1.001
    )


def break_prompt(monkeypatch):
    """As long a prompt, in other words."""
    real = language.DecoderLanguageModel.split_prompt
    monkeypatch.setattr(
        language.DecoderLanguageModel, "split_prompt", lambda self, text: real(self, text.replace("moves", "rests"))
    )


def break_deepstack(monkeypatch):
    """DeepStack rows left out."""
    monkeypatch.setattr(qwen3_vl.DeepStackLanguageModel, "deep_inputs", lambda self, embeds: {})


@pytest.mark.parametrize(
    ("broken", "law", "name"),
    [
        (break_pixels, "pixels", "internvl"),
        (break_tower_weight, "latents", "qwen2_vl"),
        (break_prompt, "prompt", "qwen2_vl"),
        (break_decoder_weight, "logits", "qwen2_vl"),
        (break_position, "logits", "internvl"),
        (break_next_position, "subset", "qwen2_vl"),
        (break_deepstack, "logits", "qwen3_vl"),
    ],
)
def test_a_broken_path_is_seen(folders, monkeypatch, broken, law, name):
    broken(monkeypatch)
    done = verify.verify_model(Models(make_source(str(folders(name)), "cpu")))
    assert law in done.failed
    if law != "pixels":
        assert "pixels" not in done.failed
    if broken in (break_position, break_next_position, break_decoder_weight):
        assert not {"pixels", "latents", "prompt"} & set(done.failed)


def test_a_failure_is_an_error_with_its_status_and_numbers(folders, monkeypatch):
    break_position(monkeypatch)
    run = run_freres("verify", folders("qwen2_vl"), "--device", "cpu", "--json")
    check_failure(run, 5, "logits differ from the stock model's: expected at most")
    shown = run_freres("verify", folders("qwen2_vl"), "--device", "cpu")
    assert shown.status == 5 and "fails" in shown.out


def test_a_prompt_of_another_length_is_a_failure(folders, monkeypatch):
    real = language.DecoderLanguageModel.split_prompt
    monkeypatch.setattr(
        language.DecoderLanguageModel,
        "split_prompt",
        lambda self, text: real(self, text.replace("moves", "moves now")),
    )
    done = verify.verify_model(Models(make_source(str(folders("qwen2_vl")), "cpu")))
    states = {item.name: item.state for item in done.laws}
    assert states["prompt"] == "fails" and states["logits"] == states["answer"] == "not run"


def test_without_a_template_the_stock_prompt_cannot_be_written(tmp_path):
    make_qwen2_vl(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": None}))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    run = run_freres("verify", tmp_path, "--device", "cpu", "--json")
    assert run.status == 0, run.err
    laws = {law["name"]: law for law in run.json["laws"]}
    assert laws["latents"]["state"] == "holds" and laws["logits"]["state"] == "not run"
    assert "the stock processor cannot write this prompt" in laws["logits"]["reason"]


def test_a_greedy_answer_may_part_only_at_a_tie():
    told = [5, 7, 9]
    scores = torch.zeros(3, 12)
    scores[range(3), told] = 1.0
    assert verify.judge_answer([5, 7, 9], told, scores, 0.1).state == "holds"
    assert verify.judge_answer([5, 8, 9], told, scores, 0.1).state == "fails"
    scores[1, 8] = 0.95
    assert verify.judge_answer([5, 8, 1], told, scores, 0.1).state == "holds"
    assert verify.judge_answer([5, 7], told, scores, 0.1).state == "fails"


def test_what_is_not_a_number_is_no_agreement():
    nan = torch.full((1, 2), float("nan"))
    assert verify.largest(nan, nan) == float("inf") == verify.largest(torch.zeros(2, 2), torch.zeros(1, 2))
    assert verify.judge("logits", verify.largest(nan, torch.zeros(1, 2)), 1.0).state == "fails"


def test_one_model_is_in_memory_at_a_time(folders, monkeypatch):
    """The stock model is gone when ours is loaded."""
    loaded, alive = [], []
    real_stock, real_load = stock.load_stock_model, language.load_submodule

    def load_stock(*arguments):
        model = real_stock(*arguments)
        loaded.append(weakref.ref(model))
        return model

    def load(*arguments):
        gc.collect()
        alive.extend(ref() is not None for ref in loaded)
        return real_load(*arguments)

    monkeypatch.setattr(verify, "load_stock_model", load_stock)
    monkeypatch.setattr(language, "load_submodule", load)
    verify.verify_model(Models(make_source(str(folders("qwen2_vl")), "cpu")))
    assert alive == [False]


def test_a_family_that_was_added_and_is_not_known_to_all_is_named():
    frames = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    with fails(5, "my_vl: no image processor of transformers is known for this family"):
        stock_pixels("my_vl", frames, vision.PixelRule((0, 0, 0), (1, 1, 1), 1, 99), 2, 1)
    with fails(5, "my_vl: the work of this family's tower is not known"):
        sizes._rows_of("my_vl", None, 4, 1)("blocks.0")
