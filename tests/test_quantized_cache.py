"""A cache in 8 bits: rows are rounded once, by at most half a step; whatever is done to it, it is the plain cache rounded."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from freres_cli.backbones import batches, engine
from freres_cli.backbones.generation import generate
from freres_cli.backbones.pruning import Pruning
from freres_cli.backbones.quantized_cache import QuantizedLayer, pack_rows, unpack_rows
from freres_cli.baselines.registry import METHODS
from freres_cli.devices import AS_COMPUTED, Storage, choose_storage
from freres_cli.errors import UsageError
from freres_cli.pipeline.session import AskRequest
from tests import family_contract, pipeline_fixtures, tiny_qwen2_vl
from tests.family_contract import QUESTION
from tests.runner import check_failure, run_freres
from tests.tiny_families import FAMILY_CASES, HIDDEN
from tests.tiny_models import CPU, open_checkpoint, video_tokens

tiny, clip, bundle = tiny_qwen2_vl.tiny, pipeline_fixtures.clip, pipeline_fixtures.bundle
one_thread = family_contract.one_thread
KINDS = ("int8", "fp8")
LARGEST = {"int8": 127.0, "fp8": 448.0}
OPTIONS = [tuple(b"yes"), tuple(b"n"), tuple(b"vielleicht")]


def random_rows(count, dtype=torch.float32, seed=0):
    """Keys of 2 sequences and 3 heads whose rows differ in size by 10 orders of magnitude; one has an outlier, one is 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 3, count, 24, generator=generator)
    rows *= 10 ** torch.linspace(-6, 4, count)[:, None]
    rows[0, 0, 0] = 0
    rows[1, 1, 1, 5] *= 1000
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv", KINDS)
def test_a_row_is_off_by_at_most_half_a_step(kv, dtype):
    rows = random_rows(60, dtype)
    found = unpack_rows(pack_rows(rows, kv), dtype, kv)
    assert found.dtype == dtype and found.shape == rows.shape
    exact, tiny_number = rows.double(), torch.finfo(dtype).tiny
    # The scale is rounded to the dtype as well, and so is the result.
    scales = (exact.abs().amax(-1, keepdim=True) / LARGEST[kv]).clamp(min=tiny_number)
    slack = torch.finfo(dtype).eps * exact.abs()
    steps = scales if kv == "int8" else torch.maximum(exact.abs() / 8, scales / 512)
    off = (found.double() - exact).abs()
    assert (off <= steps / 2 * (1 + 2 * torch.finfo(dtype).eps) + slack).all()
    assert (off > steps / 4).any(), "a step that is too fine would not fit in 8 bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv", KINDS)
def test_the_largest_number_stays_finite(kv, dtype):
    most = torch.finfo(dtype).max
    rows = torch.tensor([[most, -most, 1.0, 0.0]], dtype=dtype)
    found = unpack_rows(pack_rows(rows, kv), dtype, kv)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, :2].double(), rows[0, :2].double(), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kv", KINDS)
def test_numbers_that_are_not_finite_stay_visible(kv):
    rows = random_rows(3)
    rows[0, 0, 1, 2], rows[1, 2, 2, 0] = torch.nan, torch.inf
    found = unpack_rows(pack_rows(rows, kv), rows.dtype, kv)
    assert (found.isfinite().all(-1) == rows.isfinite().all(-1)).all()


@pytest.mark.parametrize("kv", KINDS)
def test_whatever_is_done_to_it_it_is_the_plain_cache_rounded(kv):
    """To the bit, against the layer of transformers: in chunks or at once, cropped, copied, reordered and extended."""
    keys, values = random_rows(90), random_rows(90, seed=1)
    ours, theirs = QuantizedLayer(kv), DynamicLayer()
    kept = []

    def check(mine, other):
        for packed, plain in ((mine.keys, other.keys), (mine.values, other.values)):
            assert packed.dtype == torch.uint8 and torch.equal(packed, pack_rows(plain, kv))

    for start, end in ((0, 7), (7, 8), (8, 50)):
        for layer in (ours, theirs):
            found = layer.update(keys[..., start:end, :], values[..., start:end, :])
            kept.append(found)
        for rounded, plain in zip(*kept[-2:], strict=True):
            assert torch.equal(rounded, unpack_rows(pack_rows(plain, kv), plain.dtype, kv))
        check(ours, theirs)
    twins = [copy.deepcopy(layer) for layer in (ours, theirs)]
    for layer in (ours, theirs):
        layer.crop(-9)
        layer.update(keys[..., 50:90, :], values[..., 50:90, :])
    check(ours, theirs)
    for layer in twins:
        layer.reorder_cache(torch.tensor([1, 0, 1]))
        layer.update(*(rows[[0, 1, 0], :, 50:52] for rows in (keys, values)))
    check(*twins)
    assert ours.get_seq_length() == 81 and twins[0].get_seq_length() == 52


class RoundedLayer(DynamicLayer):
    """The layer of transformers, given rows that are rounded by the definition."""

    def update(self, key_states, value_states, *args, **options):
        return super().update(*map(self.round, (key_states, value_states)))

    @staticmethod
    def round(rows):
        scales = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / scales).round() * scales


def with_storage(model, kv):
    model = copy.copy(model)
    model.storage = Storage(kv)
    return model


@torch.no_grad()
def test_attention_reads_what_the_cache_holds(tiny):
    """Equal to stock transformers with rounded rows, over a prefill in chunks and decoded tokens; the plain cache is not."""
    model, rows = with_storage(tiny.model, "int8"), tiny.whole_prompt(video_tokens(tiny.latents))
    stock = DynamicCache(config=model.decoder.config)
    stock.layers = [RoundedLayer() for _ in stock.layers]
    caches = model.new_cache(), stock, tiny.model.new_cache()
    for part in (
        *rows.split(30),
        *(model.text_rows([step], len(rows) + step, rows.next_position) for step in range(3)),
    ):
        mine, theirs, plain = (model.decode(part, cache) for cache in caches)
        assert torch.equal(mine, theirs)
    assert not torch.allclose(mine, plain, atol=1e-4)


@pytest.fixture(scope="module", params=FAMILY_CASES, ids=lambda case: case.name)
def family(request, tmp_path_factory):
    """A case, its language half with a cache in int8, and tokens of a video."""
    folder = tmp_path_factory.mktemp(request.param.name)
    request.param.make(folder)
    model = request.param.language_class.load(open_checkpoint(folder), CPU, storage=Storage("int8"))
    latents = torch.randn(
        3, *request.param.grid, HIDDEN * (1 + request.param.num_deep), generator=torch.Generator().manual_seed(0)
    )
    return request.param, model, video_tokens(latents, width=HIDDEN)


@pytest.mark.parametrize("kv", KINDS)
def test_every_family_answers_with_it(family, kv):
    """It holds as many bytes as it says, layers that keep a state are those of transformers, and answers are near those of
    the plain cache."""
    case, model, video = family
    model, plain, prompt = with_storage(model, kv), with_storage(model, None), model.prompt(QUESTION)
    prefix, other = (engine.prefill_video(own, prompt.prefix, video) for own in (model, plain))
    layers = [layer for layer in prefix.cache.layers if isinstance(layer, QuantizedLayer)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert held == prefix.num_tokens * model.kv_bytes_per_token < other.num_tokens * plain.kv_bytes_per_token / 2
    stock = [type(layer) for layer in DynamicCache(config=model.decoder.config).layers]
    assert [
        DynamicLayer if isinstance(layer, QuantizedLayer) else type(layer) for layer in prefix.cache.layers
    ] == stock
    assert case.is_hybrid == (len(layers) < len(stock))
    scores = engine.score_options(model, prefix, prompt.suffix, OPTIONS)
    exact = engine.score_options(plain, other, prompt.suffix, OPTIONS)
    assert 0 < (scores - exact).abs().max() < 0.2 * exact.abs().max()
    assert torch.equal(engine.score_options(model, prefix, prompt.suffix, OPTIONS), scores), "it is as it was lent"
    (together,) = batches.score_options_batch(model, prefix, [prompt.suffix], [OPTIONS])
    assert (together - scores).abs().max() < 0.2 * exact.abs().max()
    answer = generate(model, prefix, prompt.suffix, 3)
    list(answer)
    assert len(answer.ids) == 3


def test_the_note_has_the_bytes_of_both(family):
    _, model, _ = family
    (note,) = (note for note in model.notes if note.startswith("KV cache in int8"))
    assert (
        f"{model.kv_bytes_per_token} bytes a token in place of {with_storage(model, None).kv_bytes_per_token}" in note
    )
    assert with_storage(model, None).describe_kv() == ()


def test_pruning_in_the_decoder_works_on_it(tiny):
    """With every token kept nothing changes, to the bit; with fewer, later layers hold fewer rows."""
    model, method = with_storage(tiny.model, "int8"), METHODS["fastv"]
    video, suffix = video_tokens(tiny.latents), tiny.prompt.suffix
    scores = []
    for count in (None, len(video), 9):
        pruning = None if count is None else Pruning(method.num_full_layers, count, method.pick_attended, method.name)
        prefix = engine.prefill_video(model, tiny.prompt.prefix, video, pruning=pruning)
        scores.append(engine.score_options(model, prefix, suffix, OPTIONS))
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_the_default_is_the_plain_cache():
    assert choose_storage() == choose_storage("auto", "auto") == AS_COMPUTED == AskRequest(None, CPU).storage
    assert asdict(choose_storage("fp8")) == {"kv": "fp8", "weights": None}
    with pytest.raises(UsageError, match="--kv-dtype: expected one of auto, int8, fp8, got int4"):
        choose_storage("int4")


def test_ask_says_what_is_lost(bundle):
    flags = ("What moves?", "--choices", "a|b", "--device", "cpu", "--json")
    plain, small = run_freres("ask", bundle, *flags).json, run_freres("ask", bundle, *flags, "--kv-dtype", "int8").json
    assert (plain["kv_dtype"], small["kv_dtype"], small["weight_dtype"]) == ("float32", "int8", "float32")
    assert plain["choices"] != small["choices"]
    assert any("KV cache in int8" in note and "answers may change" in note for note in small["notes"])
    assert not any("KV cache" in note for note in plain["notes"])


@pytest.mark.slow
def test_profile_says_so_as_well(bundle):
    flags = ("--device", "cpu", "--kv-dtype", "fp8", "--repeat", 1, "--warmup", 0, "--max-new-tokens", 1)
    document = run_freres("profile", bundle, *flags, "--json").json
    assert {row["kv_dtype"] for row in document["rows"]} == {"fp8"}
    assert "KV cache in fp8: rounded, so answers may change" in document["notes"]


def test_plan_counts_the_cache_as_it_is_kept(clip):
    flags = (clip, "--tflops", 1, "--device", "cpu", "--json")
    plain, small = run_freres("plan", *flags).json, run_freres("plan", *flags, "--kv-dtype", "fp8").json
    rows = plain["context_tokens"]
    # 6 layers with 2 heads of keys and of values, of 48 numbers and, in 8 bits, a scale in float32
    assert (plain["kv_bytes"], small["kv_bytes"]) == (rows * 24 * 48 * 4, rows * 24 * (48 + 4))
    saved = plain["memory"]["ask"]["bytes"] - small["memory"]["ask"]["bytes"]
    assert saved == plain["kv_bytes"] - small["kv_bytes"] and small["kv_dtype"] == "fp8"
    assert any("KV cache in fp8" in note for note in small["notes"])


@pytest.mark.parametrize("verb", ["ask", "eval", "profile", "plan"])
def test_an_unknown_name_is_refused_before_anything_is_read(verb):
    run = run_freres(verb, "nowhere", *(["What?"] if verb == "ask" else []), "--kv-dtype", "int4")
    check_failure(run, 2)
    assert "--kv-dtype: expected one of auto, int8, fp8, got int4" in run.err
