"""Every family on CUDA: what stock transformers computes, no mixed devices, and how often the host waits for the device.

``python -m pytest -m gpu`` runs this on a real device. The default run has what a CPU can show: the same code on CPU tensors
labelled ``cuda:0`` (``tests/labelled_device.py``), with the numbers of the CPU.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from freres_cli.backbones import attention, base, engine, fused, generation, graph_decoding, long_attention, token_steps
from freres_cli.backbones.generation import generate
from freres_cli.cli.benchmark.gpu import in_one_queue
from freres_cli.devices import choose_device
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.models import Models, ModelSource
from freres_cli.pipeline.query import Query
from freres_cli.pipeline.session import Session
from freres_cli.workflows.ask import locate_evidence
from freres_cli.workflows.verify import TOLERANCES, draw_frames
from tests.family_contract import CASES, by_family
from tests.family_contract import folders as folders
from tests.family_contract import load as load
from tests.family_contract import one_thread as one_thread
from tests.labelled_device import count_waits, cuda, labelled_device, strip
from tests.runner import run_freres
from tests.tiny_models import CPU, video_tokens

# One family of each kind of tower, prompt and cache; the others take the same paths, and as long.
QUICK = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "minicpmv4_7")
# Text around every frame is in qwen3_vl; the others have a state in place of a cache, or neither.
SOME = ("qwen2_5_vl", "qwen3_5", "minicpmv4_7")
QUESTION, NUM_NEW = "What moves?", 6

on_both = pytest.mark.parametrize("device", ["labelled", pytest.param("cuda", marks=cuda)], indirect=True)
each_family = by_family(QUICK)


def on_cuda(test):
    """Mark a test that only a real device can run."""
    for mark in cuda:
        test = mark(test)
    return test


@pytest.fixture
def device(request, monkeypatch):
    if request.param == "cuda":
        yield choose_device("cuda")
        return
    with labelled_device(monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def on_cpu(load):
    """Latents and answer of each family on the CPU, which labelled tensors must equal."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = encode_and_answer(load(name, CPU), name)
        return known[name]

    return run


def frames_of(name, count):
    return CASES[name].frames(count)


def encode_and_answer(models, name):
    latents = models.encoder.encode(frames_of(name, 3))
    model, prompt = models.language_model, models.language_model.prompt(QUESTION)
    tokens = video_tokens(latents.cpu(), width=models.encoder.width)
    answer = generate(model, engine.prefill_video(model, prompt.prefix, tokens), prompt.suffix, NUM_NEW)
    list(answer)
    return latents, answer.ids


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_law_holds_on_cuda_against_stock(folders, name, dtype):
    run = run_freres("verify", folders(name), "--device", "cuda", "--dtype", dtype, "--json")
    assert run.status == 0, run.err
    laws = {law["name"]: law["state"] for law in run.json["laws"]}
    assert laws.pop("subset") == ("not run" if CASES[name].is_hybrid else "holds")
    assert set(laws.values()) == {"holds"} and run.json["environment"]["device"].startswith("cuda")


@each_family
def test_under_a_label_a_family_computes_what_it_does_on_the_cpu(load, on_cpu, name, monkeypatch):
    latents, ids = on_cpu(name)
    with labelled_device(monkeypatch) as device:
        models = load(name, device)
        ours, told = encode_and_answer(models, name)
        assert {str(half.device) for half in (models.encoder, models.language_model)} == {"cuda:0"}
    assert ours.is_cuda and torch.equal(strip(ours), latents) and told == ids


@on_both
@pytest.mark.parametrize("method", ["fre-res", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_compress_and_ask_on_the_device(load, device, method):
    def run(where):
        models = load("qwen3_vl", where)
        settings = {"preset": "bundled", "sample": "native", "grid": "4x5", "deepstack": "keep"}
        compressor = Compressor(models=models, budget_tokens=60, method=method, **settings)
        frames = draw_frames(models.encoder.frame_size(35, 28, (4, 5)), 12)
        bundle = compressor.compress(frames, seconds=[frame / 8 for frame in range(12)])
        return bundle.tokens(), bundle.open(models=models).ask(QUESTION, max_new_tokens=NUM_NEW)

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours, answer = run(device)
    assert ours.latents.device.type == "cpu" and len(ours) == answer.num_visual_tokens == 60
    assert answer.num_new_tokens == NUM_NEW
    expected, _ = run(CPU)
    if device.description.startswith("CPU"):
        assert torch.equal(ours.latents, expected.latents) and torch.equal(ours.positions, expected.positions)
    else:
        scale = float(expected.latents.abs().max())
        assert float((ours.latents - expected.latents).abs().max()) <= TOLERANCES[torch.float32] * scale


OPTIONS = ("a circle", "a square that is red")


def choose(session):
    return session.ask(QUESTION, choices=OPTIONS).choices


def choose_words(session):
    """Options of several tokens, one after the other and together."""
    session.model = copy.copy(session.model)
    session.model.choices_as = "words"
    together = session.ask_many([Query(QUESTION, OPTIONS), Query("What is it?", OPTIONS)])
    return choose(session) | {"together": max(together[1].choices.values())}


def choose_refined(session):
    answer = session.ask(QUESTION, choices=OPTIONS, refine=9)
    assert answer.num_visual_tokens == 9
    return answer.choices


def look(session):
    found = locate_evidence(session, Query(QUESTION))
    return {"visual": found["visual_share"]} | {span["start_s"]: span["share"] for span in found["spans"]}


def choose_from_file(session):
    answers = []
    for told in ("saved", "read"):
        session.forget_prefix()
        answers.append(session.ask(QUESTION, choices=OPTIONS))
        assert any(f"prefix {told}" in note for note in answers[-1].notes)
    assert answers[0].choices == answers[1].choices
    return answers[0].choices


@on_both
@pytest.mark.parametrize("name", ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in SOME)])
@pytest.mark.parametrize("ask", [choose, choose_words, choose_refined, look, choose_from_file])
def test_every_way_to_ask_gives_what_it_does_on_the_cpu(load, device, name, ask, tmp_path):
    if CASES[name].is_hybrid and ask in (look, choose_from_file):
        pytest.skip("a state says neither where it looks, nor is it kept in a file")
    found = []
    for place in (CPU, device):
        model = load(name, place).language_model
        drawn = (
            torch.randn(
                2,
                *CASES[name].grid,
                model.width * (1 + model.num_deep_layers),
                generator=torch.Generator().manual_seed(3),
            )
            / 8
        )
        tokens = video_tokens(drawn, width=model.width)
        file = None if ask is not choose_from_file else tmp_path / f"{model.device.type}.safetensors"
        found.append(ask(Session(model, tokens, len(tokens), "max", 0.0, prefix_file=file)))
    is_label = device.description.startswith("CPU")
    assert found[1] == (found[0] if is_label else pytest.approx(found[0], abs=1e-3))


@on_both
def test_the_host_waits_for_a_tower_no_more_often_for_more_frames(load, device):
    """How often is the tower's own: transformers' towers wait in their attention."""
    encoder = load("qwen3_vl", device).encoder
    found = []
    for count in (4, 12):
        with count_waits() as waits:
            encoder.encode(frames_of("qwen3_vl", count))
        found.append(sum(waits.values()))
    assert found[0] == found[1] > 0, found


@on_both
def test_waits_of_a_prefill_do_not_grow_and_those_of_an_answer_by_few_a_token(load, device):
    models = load("qwen3_vl", device)
    model, prompt = models.language_model, models.language_model.prompt(QUESTION)
    prefills, answers = [], []
    for num_frames, num_new in ((2, 4), (6, 8)):
        latents = models.encoder.encode(frames_of("qwen3_vl", num_frames)).cpu()
        with count_waits() as waits:
            prefix = engine.prefill_video(model, prompt.prefix, video_tokens(latents, width=models.encoder.width))
        prefills.append(sum(waits.values()))
        with count_waits() as waits:
            list(generate(model, prefix, prompt.suffix, num_new))
        answers.append(sum(waits.values()))
    assert prefills[0] == prefills[1]
    assert (
        4 <= answers[1] - answers[0] <= 4 * 2
    )  # four tokens more, each with one wait to check the scores and one to know the token


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].is_hybrid])
def test_a_recorded_step_gives_what_an_eager_one_gives(folders, name, dtype, monkeypatch):
    models = Models(ModelSource(str(folders(name)), choose_device("cuda"), dtype=dtype))
    model, prompt = models.language_model, models.language_model.prompt(QUESTION)
    tokens = video_tokens(models.encoder.encode(frames_of(name, 3)).cpu(), width=models.encoder.width)

    def scores_of(prefix):
        seen, real = [], generation.check_scores
        monkeypatch.setattr(generation, "check_scores", lambda logits: seen.append(real(logits).clone()) or logits)
        # Every way is asked about the same tokens: in 16 bits, a tie could send them different ways.
        monkeypatch.setattr(generation, "pick_token", lambda *_: 5 + len(seen))
        list(generate(model, prefix, prompt.suffix, NUM_NEW + 4))
        monkeypatch.setattr(generation, "check_scores", real)
        return torch.stack(seen)

    prefix = engine.prefill_video(model, prompt.prefix, tokens)
    recorded, again = scores_of(prefix), scores_of(prefix)
    assert (prefix.graph is not None) == (name != "qwen3_vl_moe") and not prefix.notes
    monkeypatch.setattr(token_steps, "can_record", lambda *_: False)
    eager = scores_of(prefix)
    assert torch.equal(recorded, again)
    limit = TOLERANCES[getattr(torch, dtype)] * float(eager.abs().max())
    assert float((recorded - eager).abs().max()) <= limit


@on_cuda
def test_a_step_that_the_device_refuses_to_record_is_run_as_before(folders, monkeypatch):
    models = Models(ModelSource(str(folders("qwen3_vl")), choose_device("cuda"), dtype="float32"))
    model, prompt = models.language_model, models.language_model.prompt(QUESTION)
    tokens = video_tokens(models.encoder.encode(frames_of("qwen3_vl", 3)).cpu(), width=models.encoder.width)
    real, answers = graph_decoding.StepGraph._step, []

    def wait(self):
        if torch.cuda.is_current_stream_capturing():
            float(self._position)
        real(self)

    for step in (real, wait, real):
        monkeypatch.setattr(graph_decoding.StepGraph, "_step", step)
        prefix = engine.prefill_video(model, prompt.prefix, tokens)
        for _ in range(2):
            answer = generate(model, prefix, prompt.suffix, NUM_NEW)
            list(answer)
            answers.append(answer.ids)
        assert (prefix.graph is None) == bool(prefix.notes) == (step is wait)
        torch.rand(1, device="cuda")  # which a recording that was not undone would refuse
    assert answers == answers[:1] * 6


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_kernel_gives_what_several_passes_give(dtype):
    kernels, note = fused.find_kernels(torch.device("cuda:0"), dtype)
    assert kernels is not None and note is None
    generator = torch.Generator("cuda").manual_seed(2)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    def share_equal(name, *arguments):
        ours, theirs = (getattr(own, name)(*arguments) for own in (kernels, fused.Written))
        # What differs does by one step of the dtype.
        assert float((ours - theirs).abs().max()) <= 2 * torch.finfo(dtype).eps * float(theirs.abs().max())
        return float((ours == theirs).float().mean())

    with torch.no_grad():
        for width in (128, 1280, 4096, 5120):
            assert share_equal("norm", draw(3, 70, width), draw(width), 1e-6) > 0.99
        for num_heads, width in ((32, 128), (16, 80), (28, 128), (1, 64)):
            decoder_angles, tower_angles = (draw(2, 1, 97, width, dtype=kind) for kind in (dtype, torch.float32))
            heads = draw(1, 97, 3, num_heads, width)[:, :, 1].transpose(1, 2)
            assert share_equal("rotate", heads, *decoder_angles) > 0.999
            assert share_equal("rotate", heads, *tower_angles) > 0.999
        assert share_equal("gate", draw(33, 12289), draw(33, 12289)) > 0.99
        assert share_equal("quick_gelu", draw(33, 5121)) > 0.99


@on_cuda
@pytest.mark.parametrize("method", ["fre-res", "adaptive"])
def test_a_method_beside_the_tower_keeps_what_it_keeps_after_it(load, method, monkeypatch):
    models = load("qwen3_vl", choose_device("cuda"))
    encode = models.encoder.encode

    def encode_late(pixels):
        torch.cuda._sleep(20_000_000)  # cycles: who does not wait for the latents reads what was there before
        return encode(pixels)

    monkeypatch.setattr(models.encoder, "encode", encode_late)
    settings = {"preset": "bundled", "sample": "native", "grid": "4x5", "track_density": 1}
    compressor = Compressor(models=models, budget_tokens=200, method=method, **settings)
    frames = draw_frames(models.encoder.frame_size(35, 28, (4, 5)), 300)

    def run():
        return compressor.compress(frames, seconds=[frame / 8 for frame in range(300)]).tokens()

    beside = run()
    with in_one_queue():
        after = run()
    assert torch.equal(beside.positions, after.positions) and torch.equal(beside.latents, after.latents)


@on_cuda
@pytest.mark.parametrize("num_keys", [7168, 3 * 7168])
def test_attention_over_a_long_prompt_is_that_of_other_kernels(num_keys):
    generator = torch.Generator("cuda").manual_seed(1)
    query, key, value = (
        torch.randn(1, heads, rows, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
        for heads, rows in ((8, 7168), (2, num_keys), (2, num_keys))
    )
    with torch.no_grad():
        is_taken = long_attention.can_attend_long(query, key)
    if not is_taken:
        assert torch.cuda.get_device_capability() < long_attention.LEAST_CAPABILITY, long_attention._PROBLEMS
        pytest.skip("needs compute capability 9.0")
    ours = long_attention.attend_long(query, key, value, None)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        bias = causal_lower_right(7168, num_keys)
        theirs = scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    assert float((ours.float() - theirs.float()).abs().max()) <= 2**-7 * float(theirs.float().abs().max())


@pytest.mark.parametrize(
    ("dtype", "capability", "is_repeated"),
    [(torch.float32, (9, 0), True), (torch.float16, (7, 5), True), (torch.float16, (8, 0), False)],
)
def test_heads_that_share_keys_are_repeated_where_no_kernel_takes_them(monkeypatch, dtype, capability, is_repeated):
    repeated = []
    monkeypatch.setattr(attention, "_repeat_heads", lambda tensor, heads: repeated.append(heads) or tensor)
    monkeypatch.setattr(attention, "takes_flash", lambda *_: False)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda query, *_, **__: query)
    with labelled_device(monkeypatch) as device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        query, key = (torch.zeros(1, heads, 3, 8, dtype=dtype, device=device.name) for heads in (4, 2))
        attention._attend_sdpa(query, key, key, None, False)
    assert bool(repeated) == is_repeated


@on_both
def test_a_tensor_left_on_the_host_is_seen(load, device, monkeypatch):
    models = load("qwen2_5_vl", device)
    latents, model = models.encoder.encode(frames_of("qwen2_5_vl", 2)).cpu(), models.language_model
    real = base.PromptRows.to

    def forget(self, device):
        rows = real(self, device)
        return replace(rows, pieces=(base.Piece(rows.embeds.cpu()),))

    monkeypatch.setattr(base.PromptRows, "to", forget)
    with pytest.raises(RuntimeError, match="same device"):
        engine.prefill_video(model, model.prompt(QUESTION).prefix, video_tokens(latents, width=models.encoder.width))


@on_both
def test_every_way_to_wait_is_counted(device):
    there = torch.tensor([3.0, 0.0, 2.0], device=device.name)
    ways = {
        "item": there[0].item,
        "bool": lambda: bool(there.any()),
        "nonzero": there.nonzero,
        "mask": lambda: there[there > 1],
        "cpu": there.cpu,
        "tolist": there.tolist,
        "copy_": lambda: torch.empty(3).copy_(there),
        "repeats": lambda: there.repeat_interleave(torch.tensor([1, 2, 1], device=device.name)),
    }
    for name, way in ways.items():
        with count_waits() as waits:
            way()
        assert sum(waits.values()) == 1, (name, dict(waits))
    with count_waits() as waits:
        (there * 2 + there.flip(0)).softmax(0)[:2].to(torch.float16)
    assert not waits
