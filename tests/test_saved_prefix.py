"""A saved prefix gives the answers of a fresh one to the bit, and no file is trusted."""

from __future__ import annotations

import copy
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from freres_cli.backbones import engine, saved_prefix
from freres_cli.backbones.attention import CAUSAL_NO_MASK, use_attention
from freres_cli.backbones.generation import generate
from freres_cli.backbones.saved_prefix import HEADER, digest_prefix, open_prefix, write_prefix
from freres_cli.devices import Storage
from tests import tiny_qwen2_vl
from tests.runner import fails
from tests.tiny_models import video_tokens
from tests.tiny_qwen2_vl import KEEP

tiny = tiny_qwen2_vl.tiny
OPTIONS = [tuple(b"yes"), tuple(b"no"), tuple(b"maybe")]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bundle.pt.prefix.safetensors"


@pytest.fixture
def opened(tiny, path):
    """Open the prefix of a video in that file."""

    def open_it(model=tiny.model, keep=KEEP, prefix_ids=tiny.prompt.prefix):
        return open_prefix(model, prefix_ids, video_tokens(tiny.latents, keep), "max", path)

    return open_it


def is_read(prefix):
    return any(note.startswith("prefix read from") for note in prefix.notes)


def answers_of(model, prefix, suffix):
    return engine.score_options(model, prefix, suffix, OPTIONS), "".join(generate(model, prefix, suffix, 40))


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_answers_are_those_of_a_fresh_prefix_to_the_bit(tiny, opened, path, kv):
    model = changed(tiny.model, kv)
    fresh = engine.prefill_video(model, tiny.prompt.prefix, video_tokens(tiny.latents, KEEP))
    saved, read = opened(model), opened(model)
    assert not is_read(saved) and is_read(read)
    assert path.stat().st_size < fresh.num_tokens * model.kv_bytes_per_token + 4096
    scores, text = answers_of(model, fresh, tiny.prompt.suffix)
    for prefix in (saved, read):
        own = answers_of(model, prefix, tiny.prompt.suffix)
        assert torch.equal(own[0], scores) and own[1] == text
        assert (prefix.num_tokens, prefix.next_position) == (fresh.num_tokens, fresh.next_position)
    for layer, other in zip(read.cache.layers, fresh.cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def changed(model, how):
    model = copy.copy(model)
    model.decoder = copy.deepcopy(model.decoder)
    if how in (None, "int8", "fp8"):
        model.storage = Storage(how)
    elif how == "weights":
        weight = model.decoder.layers[-1].self_attn.k_proj.weight
        weight.data += 0.01
    elif how == "kernel":
        model.attention = "eager"
        use_attention(model.decoder, CAUSAL_NO_MASK, "eager")
    else:
        model.fingerprint = {**model.fingerprint, "projector_sha256": "another"}
    return model


@pytest.mark.parametrize("what", ["tokens", "prompt", "weights", "kernel", "fingerprint", "int8"])
def test_a_prefix_made_from_anything_else_is_made_again_and_a_note_says_so(tiny, opened, what):
    opened()
    other = {
        "tokens": {"keep": KEEP[:-1]},
        "prompt": {"prefix_ids": (*tiny.prompt.prefix, 5)},
    }.get(what) or {"model": changed(tiny.model, what)}
    remade = opened(**other)
    assert not is_read(remade) and any("made from another bundle" in note for note in remade.notes)
    assert is_read(opened(**other)), "the new one has taken its place"
    assert not is_read(opened())


def test_the_digest_depends_on_every_position(tiny):
    rows = tiny.model.splice(tiny.prompt.prefix, video_tokens(tiny.latents, KEEP))
    moved = rows.positions.clone()
    moved[1, 0, -1] += 0.5
    others = [replace(rows, next_position=rows.next_position + 1), replace(rows, positions=moved)]
    assert len({digest_prefix(tiny.model, own) for own in (rows, *others)}) == 3


class Evil:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def rewrite(path, change, header=None):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {HEADER: json.dumps(json.loads(metadata[HEADER]) | (header or {}))})


def flip(tensors):
    tensors["keys.0"].view(torch.uint8).flatten()[9] ^= 1


DAMAGES = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a torch file": lambda path: torch.save({"keys.0": torch.zeros(2)}, path),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "another safetensors file": lambda path: save_file({"weight": torch.zeros(2)}, path),
    "a header that is a list": lambda path: save_file({"weight": torch.zeros(2)}, path, {HEADER: "[" * 50_000}),
    "one bit": lambda path: rewrite(path, flip),
    "a layer less": lambda path: rewrite(path, lambda tensors: tensors.pop("keys.0")),
    "a row less": lambda path: rewrite(path, lambda t: t.update({"keys.0": t["keys.0"][:, :, 1:].contiguous()})),
    "another dtype": lambda path: rewrite(path, lambda t: t.update({"keys.0": t["keys.0"].to(torch.float16)})),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_whole_prefix_is_refused_by_name(opened, path, damage):
    opened()
    DAMAGES[damage](path)
    with fails(4, str(path)):
        opened()


def test_a_file_that_another_run_replaced_meanwhile_is_not_damaged(opened, path, monkeypatch):
    opened()
    read_rows = saved_prefix.read_rows

    def replaced_first(where, header, *rest):
        rewrite(path, lambda tensors: tensors.pop("keys.0"), {"made_from": "another bundle"})
        read_rows(where, header, *rest)

    monkeypatch.setattr(saved_prefix, "read_rows", replaced_first)
    prefix = opened()
    assert not is_read(prefix) and any("written again" in note for note in prefix.notes)
    monkeypatch.undo()
    assert is_read(opened())


def test_a_place_that_cannot_be_written_costs_no_answer(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "bundle.prefix.safetensors"
    prefix = open_prefix(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents, KEEP), "max", path)
    assert any(note.startswith("prefix not saved: ") for note in prefix.notes)
    assert answers_of(tiny.model, prefix, tiny.prompt.suffix)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_the_locked_and_synced_file_is_the_one_that_is_moved(tmp_path, monkeypatch, dtype):
    made = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (made.append(os.fstat(number)), fsync(number)))
    layer = SimpleNamespace(keys=torch.rand(1, 2, 7, 3).to(dtype).mT, values=torch.ones(1, 2, 3, 7, dtype=dtype))
    path = tmp_path / "own.safetensors"
    write_prefix(path, SimpleNamespace(cache=SimpleNamespace(layers=[layer]), prefill_s=1.0), "digest")
    (tmp_path / "any").touch()
    assert path.stat().st_ino == made[0].st_ino and path.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert {file.name for file in tmp_path.iterdir()} == {"any", path.name}
    found = load_file(path)  # the format, as its own package reads it
    assert torch.equal(found["keys.0"], layer.keys) and torch.equal(found["values.0"], layer.values)


@pytest.mark.parametrize("name", ["x" * 300, "bad\udcff.safetensors", "shut"])
def test_a_file_that_cannot_be_read_costs_no_answer(tiny, tmp_path, monkeypatch, name):
    (tmp_path / "shut").write_bytes(b"kept")
    opener = Path.open

    def refuse(path, *args, **flags):  # root may read every file
        if path.name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return opener(path, *args, **flags)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        prefix = open_prefix(tiny.model, tiny.prompt.prefix, video_tokens(tiny.latents, KEEP), "max", tmp_path / name)
    assert any(note.startswith("prefix neither read nor saved: ") for note in prefix.notes)
    assert answers_of(tiny.model, prefix, tiny.prompt.suffix)[1] and (tmp_path / "shut").read_bytes() == b"kept"


def test_notes_of_a_prefix_are_there_when_it_is_read(opened, monkeypatch):
    monkeypatch.setattr(saved_prefix, "check_context", lambda *_: ("positions reach 9",))
    opened()
    read = opened()
    assert is_read(read) and "positions reach 9" in read.notes
