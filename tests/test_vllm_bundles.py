"""What freres gives vLLM: the rows and positions of ``freres ask``, checked before they reach the engine. Without vLLM."""

from __future__ import annotations

import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from freres_cli.backbones.placement import PLACED_FAMILIES, place_video
from freres_cli.integrations.vllm_bundles import (
    BundleReader,
    is_payload,
    load_payload,
    make_payload,
    split_payload,
)
from freres_cli.integrations.vllm_plugin import ARCHITECTURES
from freres_cli.integrations.vllm_positions import (
    FIRST_FRACTION,
    PlacedItem,
    decode_positions,
    encode_positions,
    place_prompt,
)
from freres_cli.pipeline.bundle import load_bundle
from freres_cli.workflows.export import HEADER, VLLM_FAMILIES
from freres_cli.world.bundled_model import bundled_model_dir
from tests import family_contract
from tests.pipeline_fixtures import bundle, clip, tiny
from tests.runner import check_failure, fails, run_freres
from tests.test_export import PAGE, page_code
from tests.test_manpages import tags
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import open_checkpoint, video_tokens

__all__ = ["bundle", "clip", "tiny"]
ROOT = Path(__file__).parents[1]
one_thread = family_contract.one_thread
SERVED = [case for case in FAMILY_CASES if case.name in VLLM_FAMILIES]


def test_positions_pass_through_integer_buffers_unchanged():
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(1000, generator=generator) * 10.0 ** torch.randint(-6, 6, (1000,), generator=generator)
    wanted = torch.cat([random, torch.arange(5000.0), torch.tensor([0.5, 1e-18, 2.0**24])])
    for dtype in (torch.int64, torch.int32):
        stored = encode_positions(wanted).to(dtype)
        assert torch.equal(decode_positions(stored), wanted)
    whole = torch.arange(5000)
    assert torch.equal(encode_positions(whole.float()), whole)  # as vLLM's own requests have them
    for bad in (-1.0, float(FIRST_FRACTION)):
        with pytest.raises(ValueError, match="positions: expected"):
            encode_positions(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_a_prompt_has_the_positions_of_ask(case, tmp_path):
    case.make(tmp_path)
    model = case.language_class.load(open_checkpoint(tmp_path), family_contract.CPU)
    latents = torch.randn(3, *case.grid, model.width * (1 + case.num_deep))
    video = video_tokens(latents, torch.tensor([21, 0, 3, 45, 9, 22]), width=model.width, period_s=2.5)
    video.positions[:, 1:] += torch.tensor([0.25, 0.5])
    prompt = model.prompt("Why?")
    rows = model.splice(prompt.prefix, video)
    rows = rows.then(model.text_rows(prompt.suffix, len(rows), rows.next_position))
    placed = place_video(model, video)
    item = PlacedItem(len(prompt.prefix), placed.positions.T, placed.next_position)
    found, delta = place_prompt(len(rows), [item])
    assert torch.equal(decode_positions(found), rows.positions[1:, 0])
    assert len(rows) + delta == rows.next_position
    # The rows themselves: the text that the family writes in the video, and every token in its place.
    ids = torch.tensor([*prompt.prefix, *placed.ids, *prompt.suffix])
    is_visual = torch.zeros(len(ids), dtype=torch.bool)
    is_visual[len(prompt.prefix) : len(prompt.prefix) + len(placed.ids)] = placed.is_visual
    embeds = torch.nn.functional.pad(model.decoder.embed_tokens(ids), (0, model.width * case.num_deep))
    embeds[is_visual] = placed.latents
    assert torch.equal(embeds, rows.embeds) and torch.equal(is_visual, rows.visual_mask)


def test_a_second_bundle_follows_the_first():
    first = PlacedItem(2, torch.tensor([[0.0, 0.0, 0.5]] * 3), 6.0)
    second = PlacedItem(7, torch.tensor([[1.0, 0.0, 0.0]] * 2), 4.0)
    found, delta = place_prompt(10, [first, second])
    assert decode_positions(found)[0].tolist() == [0, 1, 2, 2, 2, 8, 9, 11, 11, 14]
    assert decode_positions(found)[2].tolist() == [0, 1, 2.5, 2.5, 2.5, 8, 9, 10, 10, 14]
    assert 10 + delta == 15


@pytest.fixture(scope="module")
def reader():
    return BundleReader(str(bundled_model_dir()))


def test_a_bundle_and_its_export_are_the_same_rows(reader, bundle, tmp_path):
    out = tmp_path / "v.safetensors"
    assert run_freres("export", bundle, "--to", "vllm", "-o", out).status == 0
    made, exported = (reader.read(path.read_bytes()) for path in (bundle, out))
    for name in ("ids", "is_visual", "positions", "latents"):
        assert torch.equal(getattr(made.video, name), getattr(exported.video, name)), name
    assert made.video.next_position == exported.video.next_position
    assert torch.equal(made.video.latents, load_bundle(bundle).tokens().latents)
    assert made.digest != exported.digest == reader.read(out.read_bytes()).digest


def test_a_payload_brings_the_files_back(bundle):
    one, other = load_payload(bundle), make_payload(b"PKx")
    both = {key: torch.cat([one[key], other[key]]) for key in one}
    assert split_payload(both) == [bundle.read_bytes(), b"PKx"]
    assert split_payload([one, both]) == [bundle.read_bytes(), bundle.read_bytes(), b"PKx"]
    assert is_payload([one, other]) and is_payload(one) and not is_payload([torch.zeros(2, 3, 4, 4)])
    with fails(4, "expected a list of bundles alone"):
        split_payload([one, torch.zeros(2, 3, 4, 4)])
    both["freres_bundle_bytes"] += 1
    with fails(4, "bytes in all"):
        split_payload(both)
    with fails(4, "no such file"):
        load_payload("missing.pt")


def test_what_the_engine_would_trip_over_is_refused(reader, bundle, tiny, tmp_path):
    content = bundle.read_bytes()
    with fails(4, "bundle: damaged bundle: its end is missing"):
        reader.read(content[:-2000] + bytes(2000))
    facts = {"format": "freres.vllm/1", "width": 8, "next_position": 1.0, "model": {}}
    for headers in (
        json.dumps({key: fact for key, fact in facts.items() if key != "model"}),
        json.dumps({**facts, "model": 5}),
        json.dumps({**facts, "width": float("inf")}),
        "[" * 50_000,
    ):
        with fails(4, "neither a bundle nor a file of"):
            reader.read(save({"ids": torch.zeros(1)}, {HEADER: headers}))
    (tmp_path / "empty.pt").touch()
    with fails(4, "empty.pt: is empty"):
        load_payload(tmp_path / "empty.pt")
    with fails(4, "neither a bundle nor a file of"):
        reader.read(b"nonsense")
    with fails(5, "bundle: made for another model"):
        BundleReader(str(tiny[0])).read(content)
    out = tmp_path / "v.safetensors"
    run_freres("export", bundle, "--to", "vllm", "-o", out)
    with fails(5, "bundle: made for another model"):
        BundleReader(str(tiny[0])).read(out.read_bytes())
    tensors = load(out.read_bytes())
    with out.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    odd_ids = torch.cat([tensors["ids"][:-1], torch.tensor([10**9])])
    faults = (
        ("latents: expected (300, 192)", {"latents": tensors["latents"][:-1]}),
        ("latents: expected (300, 192)", {"latents": tensors["latents"][:, :-1]}),
        ("latents: expected finite", {"latents": tensors["latents"] * float("nan")}),
        ("positions: expected (3, 300)", {"positions": tensors["positions"][:-1]}),
        ("positions: expected 0 to", {"positions": tensors["positions"] - 1}),
        ("ids: expected 0 to", {"ids": odd_ids, "latents": tensors["latents"][:-1]}),
        ("ids: expected (300,)", {"ids": tensors["ids"].float()}),
        ("ids: expected 1 dimension, got 0", {"ids": tensors["ids"][0]}),
        ("positions: expected 2 dimensions, got 1", {"positions": tensors["positions"][0]}),
        ("latents: expected 2 dimensions, got 1", {"latents": tensors["latents"][0]}),
    )
    for message, fault in faults:
        changed = {key: value.contiguous() for key, value in {**tensors, **fault}.items()}
        with fails(4, f"bundle: {message}"):
            reader.read(save(changed, header))
    facts = json.loads(header["freres"])
    for fault in ({"next_position": 7.5}, {"next_position": -1}, {"width": "x"}, {"format": "freres.hf/1"}):
        with fails(4, "bundle: "):
            reader.read(save(tensors, {"freres": json.dumps(facts | fault)}))


@pytest.mark.parametrize("family", sorted(set(PLACED_FAMILIES) - set(VLLM_FAMILIES)))
def test_families_that_the_plug_in_has_no_model_for_are_refused_by_name(family, clip, tmp_path):
    (case,) = (case for case in FAMILY_CASES if case.name == family)
    model, path, out = tmp_path / "model", tmp_path / "b.pt", tmp_path / "v.safetensors"
    case.make(model)
    run = run_freres("compress", clip, "--model", model, "--frames", 4, "--grid", "4x5", "--budget", 40, "-o", path)
    assert run.status == 0, run.err
    told = f"{family}: the plug-in for vLLM does not serve this family: expected one of qwen2_vl"
    check_failure(run_freres("export", path, "--to", "vllm", "-o", out), 5, told)
    assert not out.exists()
    with fails(5, told):
        BundleReader(str(model)).read(path.read_bytes())


def test_the_plug_in_is_listed_and_needs_no_vllm_to_be_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["freres"].partition(":")
    assert callable(getattr(import_module(module), name))
    assert len(ARCHITECTURES) == len(SERVED)


def test_the_page_names_every_architecture_and_its_code_is_python():
    assert tags(PAGE, "VLLM") == list(ARCHITECTURES)
    for heading, block in (("VLLM", 1), ("SERVER", 1)):
        compile(page_code(heading, block, bundle="b.pt"), heading, "exec")
