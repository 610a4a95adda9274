"""``freres ask``: questions, choices, the prompt loop, and which model and adapter answer."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from freres_cli.bundle.adapter import HEADER, write_adapter
from freres_cli.bundle.store import read_bundle
from freres_cli.cli.ask import _loop
from freres_cli.method.fusion import FreResModules, ModuleShape
from tests.loaded_models import loaded_models
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.pipeline_fixtures import tiny as tiny
from tests.runner import check_failure, run_freres


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_ask_json_and_choices(bundle):
    document = run_freres("ask", bundle, "what moves?", "--choices", "A cat|A dog|A car", "--json").json
    assert document["schema"] == "freres.ask/1"
    assert document["answer"] in document["choices"] and sum(document["choices"].values()) == pytest.approx(1.0)
    assert document["answer"] == max(document["choices"], key=document["choices"].get)
    assert document["visual_tokens"] == 300 < document["context_tokens"]
    assert 0 < document["ttft_s"] < document["cold_ttft_s"]
    plain = run_freres("ask", bundle, "what moves?", "--max-new-tokens", 1, "--json").json
    assert plain["choices"] is None and plain["new_tokens"] == 1 and plain["finish_reason"] == "length"


def test_a_question_from_stdin_is_the_same_question(bundle):
    given = run_freres("ask", bundle, "what moves?", "--max-new-tokens", 8)
    piped = run_freres("ask", bundle, "-", "--max-new-tokens", 8, stdin="what moves?\n")
    assert given.status == piped.status == 0 and given.out == piped.out


def test_the_prompt_loop_is_one_session(bundle):
    """A session prefills the video once, see ``test_pipeline.py``."""
    looped = run_freres("ask", bundle, "--max-new-tokens", 6, stdin="what moves?\n\nwhere?\nwhat moves?\n")
    # What a session has to say is printed when it is opened.
    assert looped.status == 0 and looped.err.count("only knows its own world") == 1
    single = [run_freres("ask", bundle, q, "--max-new-tokens", 6).out for q in ("what moves?", "where?")]
    assert looped.out == single[0] + single[1] + single[0]


def test_a_prompt_that_nobody_can_see_does_not_end_the_loop(monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        monkeypatch.setattr(sys, "stdin", Terminal(" \n"))
        _loop(None, {}, quiet=True, where=False)


def test_sampling_is_seeded(bundle):
    flags = ("--temperature", 2.0, "--max-new-tokens", 12)
    texts = [run_freres("ask", bundle, "what?", *flags, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("value", ["0.0005", "-1"])
def test_a_temperature_that_cannot_be_is_refused_as_the_help_says(value):
    run = run_freres("ask", "missing.pt", "what?", "--temperature", value)
    check_failure(run, 2, "error: --temperature: expected 0, or at least 0.001, got ")
    assert "0 or at least 0.001" in " ".join(run_freres("ask", "--help").out.split())
    check_failure(run_freres("ask", "missing.pt", "what?", "--top-p", 2), 2, "error: --top-p: expected")


def test_another_model_is_refused(bundle, tiny):
    check_failure(run_freres("ask", bundle, "what?", "--model", tiny[0]), 5, "made for another model")


def test_a_model_folder_that_moved_is_named(clip, tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny[0], folder)
    path = tmp_path / "b.pt"
    assert run_freres("compress", clip, "--model", folder, "--frames", 4, "-o", path).status == 0
    assert run_freres("ask", path, "what?", "--max-new-tokens", 2).status == 0
    folder.rename(tmp_path / "elsewhere")
    check_failure(run_freres("ask", path, "what?"), 5, "no such folder here")
    assert run_freres("ask", path, "what?", "--max-new-tokens", 2, "--model", tmp_path / "elsewhere").status == 0


def test_a_model_folder_under_home_is_found_again(clip, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny[0].parent))
    path = tmp_path / "b.pt"
    assert run_freres("compress", clip, "--model", f"~/{tiny[0].name}", "--frames", 2, "-o", path).status == 0
    assert run_freres("ask", path, "what?", "--max-new-tokens", 1).status == 0


def test_adapters_are_used_and_foreign_ones_refused(bundle, tmp_path):
    model = loaded_models().facts
    modules = FreResModules(ModuleShape(read_bundle(bundle).manifest["model"]["width"], 8, 8))
    header = {"model": model, "shape": modules.shape.to_dict()}
    write_adapter(tmp_path / "zero.safetensors", modules.state_dict(), header)
    with torch.no_grad():
        modules.type_embedding.add_(3.0)
    write_adapter(tmp_path / "loud.safetensors", modules.state_dict(), header)
    write_adapter(
        tmp_path / "other.safetensors", modules.state_dict(), {**header, "model": {**model, "projector_sha256": "0"}}
    )
    flags = ("what moves?", "--choices", "a|b", "--json")
    plain = run_freres("ask", bundle, *flags, "--adapter", "none").json["choices"]
    # The bundled model has an adapter of its own.
    assert run_freres("ask", bundle, *flags).json["choices"] != plain
    assert run_freres("ask", bundle, *flags, "--adapter", tmp_path / "zero.safetensors").json["choices"] == plain
    assert run_freres("ask", bundle, *flags, "--adapter", tmp_path / "loud.safetensors").json["choices"] != plain
    check_failure(run_freres("ask", bundle, "x", "--adapter", tmp_path / "other.safetensors"), 5, "another model")
    later = {**header, "shape": {**header["shape"], "values": "later"}}
    write_adapter(tmp_path / "later.safetensors", modules.state_dict(), later)
    check_failure(run_freres("ask", bundle, "x", "--adapter", tmp_path / "later.safetensors"), 5, "absorber values")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    check_failure(run_freres("ask", bundle, "x", "--adapter", tmp_path / "bad.safetensors"), 5, "damaged adapter")
    for text, message in (("[" * 50_000, "damaged adapter"), (json.dumps({**header, "training": "x"}), "not a freres")):
        save_file({"weight": torch.zeros(2)}, tmp_path / "bad.safetensors", {HEADER: text})
        check_failure(run_freres("ask", bundle, "x", "--adapter", tmp_path / "bad.safetensors"), 5, message)
    check_failure(
        run_freres("ask", bundle, "x", "--adapter", tmp_path / "none"), 5, "no such file: expected an adapter"
    )


def test_control_tokens_and_other_bytes_in_a_question_are_refused(bundle):
    for text in ("end <|im_end|> now", "<|video_pad|>"):
        check_failure(run_freres("ask", bundle, text), 2, "reads as a command")
    check_failure(run_freres("ask", bundle, "what\udcff?"), 2, "UTF-8")
    check_failure(run_freres("ask", bundle, "what?", "--choices", "a|b\udcff"), 2, "UTF-8")


def test_a_saved_prefix_is_read_by_the_next_question_and_a_foreign_one_replaced(bundle, tmp_path):
    path = tmp_path / "b.pt"
    shutil.copy(bundle, path)
    kept = tmp_path / "b.pt.prefix.safetensors"
    question = ("what moves?", "--choices", "A cat|A dog", "--json")
    plain = run_freres("ask", path, *question)
    assert not kept.exists()
    runs = [run_freres("ask", path, *question, "--save-prefix") for _ in range(2)]
    assert all(run.json["choices"] == plain.json["choices"] for run in runs)
    saved, read = (" ".join(run.json["notes"]) for run in runs)
    assert (
        re.search(r"prefix saved in .*, [\d.]+ [KM]iB", saved)
        and "prefix read from" in read
        and kept.stat().st_size > 10_000
    )
    assert run_freres("repack", bundle, "--budget", 200, "-o", path, "--force").status == 0
    stale = run_freres("ask", path, *question, "--save-prefix").json
    assert "made from another bundle" in " ".join(stale["notes"])
    kept.write_bytes(b"\x80\x04N.")
    check_failure(run_freres("ask", path, *question, "--save-prefix"), 4, str(kept))
    check_failure(run_freres("ask", path, "what?", "--save-prefix", "--refine", 5), 2, "--save-prefix")
    assert kept.read_bytes() == b"\x80\x04N.", "a file that is not ours is left alone"


def test_loading_is_said_before_anything_else(bundle):
    """Importing torch takes seconds, so the first line must not wait for it."""
    program = (
        "import sys; sys.argv = ['freres', 'ask', sys.argv[1], 'what?', '--max-new-tokens', '1']\n"
        "import freres_cli.cli.ask as ask\n"
        "def tell(notes, quiet=False):\n"
        "    print('torch' in sys.modules, *notes)\n"
        "    sys.exit()\n"
        "ask.print_notes = tell\n"
        "from freres_cli.cli.app import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", program, bundle], capture_output=True, text=True, check=True)
    assert run.stdout == "False loading torch\n"


IDLE = {
    ("--choices", "a|b", "--temperature", 1): ["--temperature"],
    ("--choices", "a|b", "--seed", 5, "--top-p", 0.5, "--max-new-tokens", 3): ["--top-p", "--seed", "--max-new-tokens"],
    ("--choices", "a|b"): [],
    ("--seed", 5, "--max-new-tokens", 2): ["--seed"],
    ("--top-p", 0.5, "--max-new-tokens", 2): ["--top-p"],
    ("--seed", 5, "--top-p", 0.5, "--temperature", 1, "--max-new-tokens", 2): [],
}


@pytest.mark.parametrize("flags", IDLE)
def test_a_flag_without_effect_is_named(bundle, flags):
    run = run_freres("ask", bundle, "what moves?", *flags, "--json")
    told = [note for note in run.json["notes"] if "has no effect" in note]
    assert [note.split()[0] for note in told] == IDLE[flags] and all(f"note: {note}" in run.err for note in told)


@pytest.mark.parametrize("choices", [(["a", "b"], ["a", "b"]), (["a", "b"], None)])
def test_a_flag_has_an_effect_if_one_question_of_a_file_has_no_options(bundle, tmp_path, choices):
    rows = [{"question": "what moves?", "choices": given} for given in choices]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--questions", tmp_path / "q.jsonl", "--temperature", 1, "--max-new-tokens", 128)
    run = run_freres("ask", bundle, *flags)
    assert run.status == 0 and ("--temperature has no effect" in run.err) == (choices[1] is not None)


def test_a_line_that_fails_is_no_failure_of_the_loop_while_someone_is_typing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("\udcff\n"))
    _loop(None, {}, quiet=True, where=False)
    assert "error: question: expected UTF-8" in capsys.readouterr().err


def test_only_an_answer_that_was_cut_says_so(bundle):
    told = "cut at --max-new-tokens"
    assert told in run_freres("ask", bundle, "what moves?", "--max-new-tokens", 1).err
    assert told not in run_freres("ask", bundle, "what moves?", "--choices", "a|b").err
