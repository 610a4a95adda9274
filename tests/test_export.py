"""``freres export``: what another runtime is given answers as ``freres ask`` does. The code is that of freres-serving(7)."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from freres_cli import __version__
from freres_cli.backbones.engine import prefill_video
from freres_cli.backbones.generation import generate
from freres_cli.backbones.placement import PLACED_FAMILIES, place_video
from freres_cli.backbones.registry import FAMILIES
from freres_cli.cli import export as export_command
from freres_cli.pipeline.bundle import load_bundle
from freres_cli.workflows import export
from freres_cli.world.bundled_model import bundled_model_dir
from tests import family_contract
from tests.clips import write_clip
from tests.pipeline_fixtures import bundle, clip, tiny
from tests.runner import check_failure, fails, run_freres
from tests.test_manpages import MAN, section
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import open_checkpoint, video_tokens

__all__ = ["bundle", "clip", "tiny"]
one_thread = family_contract.one_thread
PAGE = "man7/freres-serving.7"
QUESTION, TOKENS = "what moves first?", 64
CASES = {case.name: case for case in FAMILY_CASES}


def page_code(heading: str, block: int, **names: object) -> str:
    """A block of code of a section of the page, with other files and models in place of its own."""
    code = re.findall(r"(?ms)^\.nf\n(.*?)^\.fi", section(PAGE, heading))[block]
    for old, new in names.items():
        own = {"file": r"\w+\.safetensors", "model": "Qwen/Qwen2-VL-2B-Instruct", "bundle": "bundle.pt"}[old]
        code, count = re.subn(own, str(new), code)
        assert count, (old, code)
    return code


def ask_ids(path, question=QUESTION, num=TOKENS):
    """The greedy ids that ``freres ask`` decodes, and its session."""
    session = load_bundle(path).open(device="cpu")
    ids = session.model.prompt(question)
    prefix = prefill_video(session.model, ids.prefix, session.tokens, session.text_after)
    answer = generate(session.model, prefix, ids.suffix, num)
    list(answer)
    return answer.ids, session


def slow_unless(name: str):
    is_default = name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    return pytest.param(name, marks=[] if is_default else pytest.mark.slow)


@pytest.fixture(params=map(slow_unless, PLACED_FAMILIES))
def made(request, clip, tmp_path):
    """A bundle made with a tiny model of each family, and the model's folder."""
    model, path = tmp_path / "model", tmp_path / "b.pt"
    CASES[request.param].make(model)
    run = run_freres(
        *("compress", clip, "--model", model, "--frames", 8, "--grid", "4x5", "--budget", 70, "--device", "cpu"),
        "-o",
        path,
    )
    assert run.status == 0, run.err
    return path, model


def test_generate_of_transformers_says_what_ask_says(made, tmp_path):
    path, model = made
    out = tmp_path / "p.safetensors"
    run = run_freres("export", path, "--to", "hf", "-o", out)
    assert run.status == 0 and run.out == f"{out}\n", run.err
    told: dict = {}
    exec(page_code("TRANSFORMERS", 1, file=out, model=model), told)
    expected, session = ask_ids(path)
    start = told["ids"].shape[1]
    answer = told["said"][0, start:].tolist()
    assert answer == expected and len(set(answer)) > 4
    if not session.model.text_per_frame(session.tokens).any():
        assert bool((session.tokens.positions % 1).any()), "no fractional position was tried"
    # Without the positions, the answer is another.
    given = told["given"]
    outputs = told["BaseModelOutputWithDeepstackFeatures"](
        pooler_output=[given["video"]], deepstack_features=[[rows] for rows in given["deepstack"]]
    )
    plain = {"input_ids": told["ids"], "position_ids": torch.arange(start).expand(4, 1, -1)}
    other = told["model"].generate(
        **plain, mm_encoder_outputs={"video": outputs}, max_new_tokens=TOKENS, do_sample=False
    )
    assert other[0, start:].tolist() != expected


def test_the_tokens_alone_are_those_of_the_bundle(bundle, tmp_path, monkeypatch):
    out = tmp_path / "t.safetensors"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    document = run_freres("export", bundle, "--to", "safetensors", "-o", out, "--json").json
    tokens = load_bundle(bundle).tokens()
    found = load_file(out)
    assert set(found) == {"latents", "positions", "seconds", "kind", "gop", "energy", "frame_seconds"}
    assert all(torch.equal(value, getattr(tokens, name)) for name, value in found.items())
    assert document["tensors"] == {name: list(value.shape) for name, value in found.items()}
    assert document["visual_tokens"] == len(tokens) and document["output_bytes"] == out.stat().st_size
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["freres"])
    assert facts["grid"] == list(tokens.grid) and facts["width"] == tokens.width
    assert facts["bundle_sha256"] == hashlib.sha256(bundle.read_bytes()).hexdigest()
    exec(page_code("SAFETENSORS", 1, file=out), {})


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PLACED_FAMILIES)))
def test_families_with_other_rows_in_the_prompt_are_refused_by_name(family, tmp_path):
    case = CASES[family]
    case.make(tmp_path)
    model = case.language_class.load_without_weights(open_checkpoint(tmp_path))
    latents = torch.zeros(2, *case.grid, model.width)
    with fails(5, f"{family}: this family's prompt cannot be exported"):
        place_video(model, video_tokens(latents, width=model.width))


def test_what_cannot_be_exported_is_refused_and_nothing_written(bundle, tiny, tmp_path):
    out = tmp_path / "x.safetensors"
    check_failure(run_freres("export", bundle, "--to", "grid", "-o", out), 2, "--to: expected one of")
    check_failure(run_freres("export", tmp_path / "no.pt", "--to", "hf", "-o", out), 4, "no such file")
    check_failure(run_freres("export", bundle, "--to", "hf", "--model", tiny[0], "-o", out), 5, "for another model")
    assert not out.exists()
    out.write_bytes(b"kept")
    check_failure(run_freres("export", bundle, "--to", "hf", "-o", out), 2, "already exists")
    assert out.read_bytes() == b"kept"


def test_the_version_of_the_page_is_that_of_the_package():
    assert f'"freres {__version__}"' in (MAN / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("named", [False, True])
def test_an_export_does_not_replace_the_model_of_its_bundle(bundle, tmp_path, named):
    """Whether the model is named or the bundle records it."""
    model = shutil.copytree(bundled_model_dir(), tmp_path / "model")
    clip = write_clip(tmp_path / "a.mp4", 4, fps=4)
    made = tmp_path / "b.pt"
    assert run_freres("compress", clip, "--model", model, "--budget", 20, "-o", made, "--device", "cpu").status == 0
    weights = model / "model.safetensors"
    held = weights.read_bytes()
    own = ("--model", model) if named else ()
    for target in ("hf", "vllm"):
        run = run_freres("export", made, "--to", target, *own, "-o", weights, "--force")
        check_failure(run, 2, "is the model's model.safetensors itself")
    assert weights.read_bytes() == held


def test_a_model_that_an_export_does_not_need_is_refused(bundle, tmp_path):
    run = run_freres("export", bundle, "--to", "safetensors", "--model", "no/such", "-o", tmp_path / "x")
    check_failure(run, 2, "--model: has no effect with --to safetensors")
    run = run_freres("export", bundle, "--to", "safetensors", "--revision", "v1", "-o", tmp_path / "x")
    check_failure(run, 2, "--revision: has no effect with --to safetensors")
    run = run_freres("export", bundle, "--to", "vllm", "--revision", "v1", "-o", tmp_path / "x")
    check_failure(run, 2, "--revision: bundled is not a hub model")


def test_an_export_does_not_replace_its_own_bundle(bundle, tmp_path):
    copy = tmp_path / "bundle.pt"
    copy.write_bytes(bundle.read_bytes())
    run = run_freres("export", copy, "--to", "safetensors", "-o", copy, "--force")
    check_failure(run, 2, "is the bundle itself")
    assert copy.read_bytes() == bundle.read_bytes()
    check_failure(
        run_freres("export", tmp_path / "no.pt", "--to", "safetensors", "-o", copy, "--force"), 4, "no such file"
    )


def test_the_command_takes_every_target():
    assert set(export_command.TARGETS) == set(export.TARGETS)
