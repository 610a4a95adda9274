"""``freres models`` and ``freres doctor``: numbers that agree with the code, and reasons for what cannot run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import av
import pytest
import torch

from freres_cli.backbones import registry
from freres_cli.backbones.registry import FAMILIES, KNOWN_CHECKPOINTS
from freres_cli.errors import ResourceError
from freres_cli.workflows import doctor
from tests.runner import run_freres

GIB = 2**30


def finding(part):
    return next(found for found in doctor.examine_machine() if found.part == part)


def test_presets_models_and_doctor_answer(tmp_path):
    listed = run_freres("presets").out
    assert "compact-16f" in listed and "4413" in listed
    printed = run_freres("presets", "compact-16f").out
    (tmp_path / "mine.yaml").write_text(printed.replace("4413", "4000"))
    assert run_freres("presets", tmp_path / "mine.yaml", "--json").json["settings"]["budget_tokens"] == 4000
    assert "Qwen/Qwen2-VL-7B-Instruct" in run_freres("models").out
    assert run_freres("models", "--json").json["bundled"]["freres_trained"]
    findings = run_freres("doctor", "--json").json["findings"]
    assert {f["state"] for f in findings} <= {"ok", "limited", "missing"}
    assert run_freres("doctor").status == 0


def test_models_in_json_and_in_words():
    document = run_freres("models", "--json").json
    assert document["families"] == list(FAMILIES)
    assert document["environment"]["torch"] == torch.__version__
    text = run_freres("models").out
    for known, row in zip(KNOWN_CHECKPOINTS, document["checkpoints"], strict=True):
        assert row["model_id"] == known.model_id and row["kv_bytes_per_token"] == known.kv_bytes_per_token
        assert row["bundle_bytes_per_token"] == known.bundle_bytes_per_token
        line = next(line for line in text.splitlines() if line.startswith(known.model_id + " "))
        assert (known.width is None) == (" - " in line.partition("KiB")[0])
        assert not known.is_tested and "real weights not run" in line
    unknown = next(row for row in document["checkpoints"] if row["family"] == "qwen3_5")
    assert unknown["width"] is unknown["bundle_bytes_per_token"] is unknown["tokens_per_frame"] is None
    for family in FAMILIES:
        assert family in text


def test_every_family_has_its_line():
    parts = [found.part for found in doctor.examine_machine()]
    assert parts[-len(FAMILIES) :] == list(FAMILIES)
    run = run_freres("doctor", "--json")
    assert run.status == 0 and {f["part"] for f in run.json["findings"]} == set(parts)


def test_a_family_that_transformers_lacks_says_so(monkeypatch):
    real = registry.import_module

    def lacking(name):
        if name.endswith(".qwen3_5"):
            raise ImportError("cannot import name 'Qwen3_5Config' from 'transformers'\nmore")
        return real(name)

    monkeypatch.setattr(registry, "import_module", lacking)
    found = finding("qwen3_5")
    assert found.state == "missing" and not found.is_needed
    assert "lacks this family: cannot import name 'Qwen3_5Config'" in found.text
    assert found.text.endswith("install transformers 5.23 or newer, below 6") and "\n" not in found.text
    assert finding("qwen2_vl").state != "missing"
    assert run_freres("doctor").status == 0  # the main job does not need it


@pytest.mark.parametrize(
    ("room", "state", "fits", "does_not"),
    [(5, "limited", ["2B"], ["7B"]), (16, "ok", ["2B", "7B"], []), (1, "limited", [], ["2B", "7B"])],
)
def test_room_for_the_weights(monkeypatch, room, state, fits, does_not):
    monkeypatch.setattr(doctor, "memory_bytes", lambda: room * GIB)
    found = finding("qwen2_vl")
    has, _, lacks = found.text.partition(f"{room} GiB is not enough for ")
    assert found.state == state
    for size, place in [*[(s, has) for s in fits], *[(s, lacks) for s in does_not]]:
        assert f"Qwen2-VL-{size}-Instruct" in place
    assert bool(lacks) == bool(does_not)


def test_memory_is_that_of_the_largest_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = [SimpleNamespace(name="a GPU", total_memory=size * GIB) for size in (8, 24)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: sizes[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _name: (7, 0))
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2 * GIB)
    assert finding("qwen2_vl").state == "ok"
    assert "cannot run: expected compute capability 8.0 or newer, got 7.0" in finding("attention").text


def test_kernels_of_a_cuda_device_are_tried(monkeypatch):
    assert doctor._kernels() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for note, state in ((None, "ok"), ("towers take longer", "limited")):
        monkeypatch.setattr(doctor, "find_kernels", lambda *_, note=note: (None, note))
        (found,) = doctor._kernels()
        assert found.state == state and (note is None or found.text == note) and not found.is_needed


def test_decoding_on_a_cuda_device_is_tried(monkeypatch):
    assert torch.cuda.is_available() or doctor._gpu_decoder() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "choose_gpu", lambda _: None)
    assert doctor._gpu_decoder()[0].state == "ok"

    def refuse(_):
        raise ResourceError("decode: no", "take the CPU")

    monkeypatch.setattr(doctor, "choose_gpu", refuse)
    (found,) = doctor._gpu_decoder()
    assert (found.state, found.text, found.is_needed) == ("limited", "decode: no: take the CPU", False)


def test_an_encoder_that_this_ffmpeg_does_not_know_is_a_limit_and_no_bug(monkeypatch):
    make = av.Codec
    monkeypatch.setattr(doctor.av, "Codec", lambda name, mode: make("no such encoder", mode))
    assert doctor._encoder().state == "limited"


def test_attention_and_hub_are_reported(monkeypatch, tmp_path):
    text = finding("attention").text
    if not torch.cuda.is_available():
        assert text == "sdpa: auto, exact on the CPU; --attn flash cannot run: expected a CUDA device, got cpu"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    assert "GiB free for them" in finding("hub").text
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "is not writable" in finding("hub").text and finding("hub").state == "limited"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in finding("hub").text


def test_what_is_missing_is_in_the_document_as_well(monkeypatch):
    gone = [doctor.Finding("PyAV", "missing", "not installed", is_needed=True)]
    monkeypatch.setattr(doctor, "examine_machine", lambda: gone)
    run = run_freres("doctor", "--json")
    assert run.status == 6 and "the main job cannot run: PyAV" in run.err
    assert [row["state"] for row in json.loads(run.out)["findings"]] == ["missing"]


def test_bad_defaults_from_the_environment_are_told_as_commands_tell_them(monkeypatch):
    monkeypatch.setenv("FRERES_DEVICE", "tpu")
    monkeypatch.setenv("FRERES_DTYPE", "float32")
    assert finding("FRERES_DTYPE").state == "ok"
    found = finding("FRERES_DEVICE")
    assert found.state == "missing" and found.text in run_freres("ask", "none.pt", "what?").err
    run = run_freres("doctor")
    assert run.status == 6 and "the main job cannot run: FRERES_DEVICE" in run.err
    monkeypatch.delenv("FRERES_DEVICE")
    assert run_freres("doctor").status == 0
