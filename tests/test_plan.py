"""``freres plan``: work against torch's own counter, memory against what a process holds, and whether it fits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from freres_cli.backbones import hub
from freres_cli.backbones.sizes import measure_decoder, measure_tower
from freres_cli.cli.compress import make_options
from freres_cli.cli.plan import parse_size
from freres_cli.devices import AS_COMPUTED, Storage
from freres_cli.errors import UsageError
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.costs import ask_parts, sum_bytes
from freres_cli.pipeline.models import Models, make_source
from freres_cli.pipeline.prompt_text import bound_text
from freres_cli.workflows.plan import Planner
from freres_cli.world.bundled_model import bundled_model_dir
from tests import pipeline_fixtures
from tests.clips import write_clip
from tests.family_contract import one_thread  # noqa: F401
from tests.runner import run_freres
from tests.tiny_families import FAMILY_CASES
from tests.tiny_models import CPU, make_qwen2_vl, open_checkpoint

clip, tiny = pipeline_fixtures.clip, pipeline_fixtures.tiny
# Written out, so that the counter sees every product of attention.
EAGER = replace(CPU, attention="eager")
ROWS = 192  # whole chunks of linear attention


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
def test_flops_are_those_that_torch_counts(case, tmp_path):
    case.make(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    encoder = case.vision_class.load(checkpoint, EAGER)
    weightless = case.vision_class.load_without_weights(checkpoint)
    size = weightless.frame_size(160, 128, case.grid)
    tower = measure_tower(weightless, size)
    with FlopCounterMode(display=False) as counter:
        encoder.encode(case.frames(16))
    assert counter.get_total_flops() == 16 * tower.flops
    assert tower.num_parameters == sum(p.numel() for p in encoder.tower.parameters())

    model = case.language_class.load(checkpoint, EAGER)
    for module in model.decoder.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"  # the counter does not know grouped products
    decoder = measure_decoder(case.language_class.load_without_weights(checkpoint))
    rows, cache = model.text_rows(list(range(ROWS)), 0, 0.0), model.new_cache()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(model.decode(rows, cache)[-1:])
    # The short convolution of linear attention computes a few rows beyond the end.
    slack = 1e-4 if case.is_hybrid else 0.0
    assert counter.get_total_flops() == pytest.approx(decoder.prefill_flops(ROWS, 4096), rel=slack, abs=0)
    assert decoder.num_parameters == model.num_parameters
    if not case.is_hybrid:
        assert 2 * decoder.read_weights == decoder.row_flops + decoder.head_flops
    for storage in (AS_COMPUTED, Storage("int8"), Storage("fp8")):
        model.storage = storage
        assert decoder.row_bytes(model.dtype.itemsize, storage) == model.kv_bytes_per_token
    assert decoder.state_values == sum(
        state.numel()
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for state in flatten(getattr(layer, name, None))
    )


def flatten(states):
    values = states.values() if isinstance(states, dict) else [states]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_later_passes_attend_to_all_rows_so_far(tiny):
    decoder = measure_decoder(Models(make_source(str(tiny[0]), "cpu")).prompt_counter)
    pairs = [(decoder.prefill_flops(100, q) - decoder.prefill_flops(100, 1000)) / decoder.pair_flops for q in (100, 40)]
    assert pairs == [0, 40 * 40 + 40 * 80 + 20 * 100 - 100 * 100]


def test_a_plan_agrees_with_the_dry_run_and_reads_no_weights(clip, tiny, tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    for path in tiny[0].iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_text(path.read_text())
    flags = ("--budget", 300, "--device", "cpu", "--json")
    planned = run_freres("plan", clip, "--model", folder, "--tflops", 0.1, *flags)
    assert planned.status == 0, planned.err
    dry = run_freres("compress", clip, "--model", tiny[0], "--dry-run", *flags).json
    document = planned.json
    assert document["schema"] == "freres.plan/2"
    assert {key: document[key] for key in dry if key not in ("schema", "environment", "settings")} == {
        key: dry[key] for key in dry if key not in ("schema", "environment", "settings")
    }
    stages = {stage["name"]: stage for stage in document["stages"]}
    assert stages["tower"]["flops"] == document["frames"] * document["frame_tower_flops"]
    assert stages["prefill"]["seconds"] == pytest.approx(stages["prefill"]["flops"] / 1e11)
    assert stages["per token"]["seconds"] is None and all(stage["assumes"] for stage in document["stages"])
    for stage in document["memory"].values():
        assert stage["bytes"] == sum(part["num_bytes"] for part in stage["parts"])
    parts = {part["name"]: part for stage in document["memory"].values() for part in stage["parts"]}
    # the plan loads no weights, and yet knows what they take
    assert parts["decoder weights"]["num_bytes"] + parts["tower weights"]["num_bytes"] == sum(
        4 * p.numel() for p in tiny[1].parameters()
    )
    assert document["kv_bytes"] == document["context_tokens"] * tiny_kv_bytes(tiny[1])
    assert "frames that repeat the last one are not encoded" in document["notes"][1]
    moving = run_freres("plan", clip, "--model", folder, "--tflops", 0.1, *flags, "--set", "still_levels=3").json
    assert "by more than 3 levels are not encoded" in moving["notes"][1]


def tiny_kv_bytes(stock):
    text = stock.config.text_config
    head = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * 4


def test_of_a_hub_model_only_configs_are_fetched(clip, tiny, monkeypatch):
    asked = []

    def fetch(model_id, revision, names):
        asked.extend(names)
        return tiny[0]

    monkeypatch.setattr("freres_cli.backbones.checkpoint.fetch", fetch)
    run = run_freres("plan", clip, "--model", "some/model", "--budget", 100, "--tflops", 1, "--device", "cpu")
    assert run.status == 0, run.err
    assert set(asked) <= {*hub.CONFIG_FILES, *hub.TOKENIZER_FILES}


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("24000MiB", 24000 * 2**20), ("1.5 GiB", 3 * 2**29)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24gigs", "0GiB", ""])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="24GiB"):
        parse_size(text)


def test_what_does_not_fit_says_what_would(clip, tmp_path):
    make_qwen2_vl(tmp_path, layers=8, hidden=192, tower=16, depth=1)  # a decoder that takes more than the tower
    planner = Planner(clip, make_options({"grid": "12x12"}, None, str(tmp_path), device="cpu"), False)
    limit = planner.cost(2500).peak_bytes
    largest = planner.largest_budget(limit)
    assert largest == pytest.approx(2500, rel=0.01)
    assert planner.cost(largest).peak_bytes <= limit < planner.cost(largest * 101 // 100).peak_bytes

    def run(budget, limit):
        flags = ("--model", tmp_path, "--tflops", 1, "--device", "cpu", "--set", "grid=12x12", "--json")
        return run_freres("plan", clip, *flags, "--budget", budget, "--device-memory", limit)

    def check_refusal(run, largest, hint):
        """The document says it as well as the message."""
        assert run.status == 6 and "does not fit: expected at most" in run.err and hint in run.err
        assert json.loads(run.out)["fits"] is False and json.loads(run.out)["largest_budget"] == largest

    check_refusal(run(3000, f"{limit}B"), largest, f"--budget {largest} would fit")
    fitting = run(largest, f"{limit}B")
    assert fitting.json["fits"] is True and fitting.json["largest_budget"] == largest
    assert run(100, "24GiB").json["largest_budget"] == planner.cost().plan.full_tokens
    check_refusal(run(100, "1KiB"), None, "no budget fits")
    flags = ("--model", tmp_path, "--tflops", 1, "--device", "cpu", "--set", "grid=12x12", "--method", "full", "--json")
    whole = run_freres("plan", clip, *flags, "--device-memory", f"{limit}B")
    check_refusal(whole, None, "method full keeps every token: use another one")
    roomy = run_freres("plan", clip, *flags, "--device-memory", "24GiB")
    assert roomy.json["largest_budget"] == planner.cost().plan.full_tokens


def test_a_prompt_beyond_the_models_context_is_told_before_and_after(clip, tiny):
    options = make_options({"budget_tokens": 300}, None, str(tiny[0]), device="cpu")
    planner, compressor = Planner(clip, options, False), Compressor.from_options(options)
    told = "freres ask {} it; use fewer tokens, or ask with --refine"
    assert not any(told.format("may refuse") in note for note in planner.notes)
    planner.language.max_context_tokens = limit = planner.cost().context_tokens
    assert any(f"up to {limit} tokens" in note and told.format("may refuse") in note for note in planner.notes)
    largest = planner.largest_budget(2**40)
    assert planner.cost(largest).context_tokens < limit <= planner.cost(largest + 1).context_tokens
    made = compressor.compress(clip)
    assert not any(told.format("refuses") in note for note in made.notes)
    compressor.models.prompt_counter.max_context_tokens = made.manifest["tokens"]["context_tokens"]
    assert any(told.format("refuses") in note for note in compressor.compress(clip).notes)
    whole = Planner(clip, make_options({}, None, str(tiny[0]), None, "full", device="cpu"), False)
    whole.language.max_context_tokens = 10**6
    assert whole.largest_budget(2**40) == whole.cost().plan.full_tokens
    whole.language.max_context_tokens = whole.cost().context_tokens
    assert whole.largest_budget(2**40) is None


@pytest.mark.parametrize("frames", [1, 40])
@pytest.mark.parametrize("method", ["uniform", "adaptive"])
def test_no_bundle_has_more_context_than_was_planned_at_most(frames, method, tmp_path):
    next(case for case in FAMILY_CASES if case.name == "qwen3_vl").make(tmp_path / "model")
    clip = write_clip(tmp_path / "long.mp4", 101, fps=1)
    own = {"sample": "count", "sample_count": frames, "budget_tokens": 10}
    compressor = Compressor.from_options(make_options(own, None, str(tmp_path / "model"), None, method, device="cpu"))
    bound = bound_text(compressor.plan(clip), compressor.models, method)
    counted = compressor.compress(clip).manifest["tokens"]
    assert counted["context_tokens"] <= bound["context_tokens"]
    assert counted["text_overhead_tokens"] <= bound["text_overhead_tokens"]


def test_cuts_may_add_tokens_to_what_is_expected_and_the_plan_counts_them(tiny, tmp_path):
    random = np.random.default_rng(0)
    scenes = random.integers(0, 200, (5, 64, 64, 3), dtype=np.uint8).repeat(20, 0)[:96]
    shown = list(scenes + random.integers(0, 50, scenes.shape, dtype=np.uint8))
    clip = write_clip(tmp_path / "cuts.mp4", len(shown), pictures=shown)
    own = {"sample": "native", "anchors": 4, "budget_tokens": 800, "grid": "4x5", "variant": "temporal"}
    compressor = Compressor.from_options(make_options(own, "long-video", str(tiny[0]), None, "fre-res", device="cpu"))
    plan, tokens = compressor.plan(clip), compressor.compress(clip).manifest["tokens"]
    assert plan.budget.expected.total < tokens["visual_tokens"] <= plan.bound_tokens
    assert tokens["context_tokens"] <= bound_text(plan, compressor.models, "fre-res")["context_tokens"]


def test_lines_are_only_told_of_where_they_are_drawn(clip, tiny):
    def notes_at(budget):
        own = {"budget_tokens": budget, "line_levels": 16}
        return " ".join(Planner(clip, make_options(own, None, str(tiny[0]), device="cpu"), False).notes)

    assert "within 16 levels of the line" in notes_at(50) and "of the line" not in notes_at(100_000)


def test_weights_are_read_whole_before_a_cpu_puts_them_into_8_bits(tiny):
    decoder = measure_decoder(Models(make_source(str(tiny[0]), "cpu")).prompt_counter)
    parts, *others = (
        ask_parts(decoder, 10, 100, 100, 4, Storage(weights=weights), is_cuda=is_cuda)
        for weights, is_cuda in (("int8", False), ("int8", True), (None, False))
    )
    assert sum_bytes(parts, is_cuda=False) >= 4 * decoder.num_parameters
    assert parts[-1].name == "weights as they are read"
    assert all(part.name != parts[-1].name for own in others for part in own)


def test_a_gpu_has_a_context_and_no_frames(clip, tiny):
    chosen = make_options({}, None, str(tiny[0]))
    gpu, here = (Planner(clip, chosen, is_cuda).cost() for is_cuda in (True, False))
    assert gpu.base_bytes > here.base_bytes == 0
    host = [part.num_bytes for part in gpu.encode if not part.is_on_device]
    assert sum(host) > 0 and gpu.encode_bytes == sum(part.num_bytes for part in gpu.encode) - sum(host)
    assert gpu.dtype == torch.float32  # as the checkpoint is stored


def test_the_times_of_a_gpu_that_is_not_here_are_not_known(clip, monkeypatch):
    monkeypatch.delenv("FRERES_DEVICE", raising=False)
    flags = ("--budget", 300, "--device-memory", "24GiB", "--json")
    gpu = run_freres("plan", clip, *flags).json
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert gpu["base_memory_bytes"] > 0 and "--tflops" in gpu["speed"]["source"]
    seconds = {stage["name"]: stage["seconds"] for stage in gpu["stages"]}
    assert seconds["tower"] is seconds["prefill"] is None and seconds["decode"] > 0
    monkeypatch.setenv("FRERES_DEVICE", "cpu")
    here = run_freres("plan", clip, *flags).json
    assert here["base_memory_bytes"] == 0 and all(stage["seconds"] for stage in here["stages"])


def test_what_a_method_keeps_is_planned_as_it_is_stored(clip, tmp_path):
    next(case for case in FAMILY_CASES if case.name == "qwen3_vl").make(tmp_path)

    def rows_of(method, **settings):
        options = make_options({"budget_tokens": 64, **settings}, None, str(tmp_path), None, method, device="cpu")
        planner = Planner(clip, options, False)
        (part,) = (part for part in planner.cost().encode if part.name == "tokens of the bundle")
        return part.num_bytes // 64 // planner.dtype.itemsize, planner.encoder

    plain, encoder = rows_of("adaptive")
    channels = encoder.width * (1 + encoder.num_deep_layers)
    assert encoder.num_deep_layers > 0
    assert plain == channels and rows_of("adaptive", trends="keep")[0] == channels + encoder.width
    assert rows_of("adaptive", deepstack="drop")[0] == encoder.width


def test_a_plan_is_for_the_dtype_that_is_stored_whatever_the_config_says(clip, tmp_path):
    shutil.copytree(bundled_model_dir(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    stored = Models(make_source(str(tmp_path), "cpu")).checkpoint.stored_dtype(("",))
    assert stored != torch.float16 and Planner(clip, make_options({}, None, str(tmp_path)), True).dtype == stored
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert Planner(clip, make_options({}, None, str(tmp_path)), True).dtype == torch.float16, "no weights are needed"


def test_the_speed_of_this_device_is_measured(clip):
    document = run_freres("plan", clip, "--budget", 300, "--device", "cpu", "--json").json
    assert document["speed"]["flops_per_s"] > 1e8 and document["speed"]["bytes_per_s"] > 1e8
    assert all(stage["seconds"] > 0 for stage in document["stages"])
    text = run_freres("plan", clip, "--budget", 300, "--device", "cpu").out
    assert "estimate" in text and "KV cache" in text and "the interpreter, not counted" in text


# Reads its peak in a process of its own, after the libraries have loaded what they need, and after the weights are in.
MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from freres_cli.bench.clock import PeakMemory
from freres_cli.cli.compress import make_options
from freres_cli.pipeline.compressor import Compressor
from freres_cli.pipeline.costs import ask_parts, sum_bytes
from freres_cli.pipeline.models import make_source
from freres_cli.pipeline.session import AskRequest, open_session
kind, folder, small, clip, budget, bundle = sys.argv[1:]
memory = PeakMemory(torch.device("cpu"))

def run(folder, bundle):
    if kind == "compress":
        chosen = make_options({"budget_tokens": int(budget)}, "qwen2-vl-7b", folder, device="cpu", dtype="float32")
        compressor = Compressor.from_options(chosen)
        compressor.models.encoder
        memory.reset()
        made = compressor.compress(Path(clip))
        peak = memory.read_bytes()
        made.save(bundle, force=True)
        return peak
    session = open_session(AskRequest(Path(bundle), make_source(folder, "cpu").device, model=folder, dtype="float32"))
    memory.reset()
    session.ask("what?", max_new_tokens=2)
    return memory.read_bytes()

run(small, bundle + ".small")
memory.reset()
base = memory.read_bytes()
print(json.dumps({"base": base, "peak": run(folder, bundle)}))
"""


@pytest.mark.slow
def test_memory_is_what_a_process_holds(tmp_path):
    """Within 10 %, of a clip with as many cuts as are planned for. The C library is told to give freed blocks back, which by
    default it keeps."""
    scenes = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 3), dtype=np.uint8).repeat(2, 0)
    shown = list(scenes.repeat(24, 1).repeat(24, 2))
    clip = write_clip(tmp_path / "cuts.mp4", len(shown), fps=30, size=(192, 192), pictures=shown)
    small, folder = tmp_path / "small", tmp_path / "middle"
    make_qwen2_vl(small, layers=2, context=65536)
    make_qwen2_vl(folder, layers=8, hidden=768, depth=6, tower=512, intermediate=2048, context=65536)
    flags = ("--budget", 8000, "--preset", "qwen2-vl-7b", "--model", folder, "--device", "cpu", "--dtype", "float32")
    planned = run_freres("plan", clip, *flags, "--tflops", 1, "--json").json["memory"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    for kind in ("compress", "ask"):
        arguments = [kind, folder, small, clip, 8000, tmp_path / "bundle.pt"]
        command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        assert planned[kind]["bytes"] == pytest.approx(measured["peak"] - measured["base"], rel=0.1), (kind, measured)


@pytest.mark.parametrize("rate", [{"sample": "fps", "sample_fps": 2.0}, {"sample": "count", "sample_count": 6}])
def test_a_denser_track_reads_as_many_times_the_frames(clip, rate):
    plan = Compressor(device="cpu", budget_tokens=40, track_density=3, **rate).plan(clip)
    assert plan.num_frames == 3 * plan.baseline_frames > 3
