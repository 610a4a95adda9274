"""What was measured on a GPU: the README's tables hold it, and ``freres plan`` would have said it."""

from __future__ import annotations

import torch

from freres_cli.backbones.engine import is_long_prompt
from freres_cli.backbones.long_attention import LEAST_CHUNK_TOKENS, LONG_CHUNK_TOKENS
from freres_cli.backbones.released import write_weightless
from freres_cli.backbones.row_parts import PART_ROWS
from freres_cli.backbones.sizes import measure_decoder
from freres_cli.pipeline.costs import ask_parts, sum_bytes
from freres_cli.pipeline.models import Models, ModelSource
from tests.test_readme_tables import read_part, tables_after
from tests.tiny_models import CPU

ROWS = {"uniform, 1 fps": "uniform 1 fps", "Fourier 8x": "fourier 8x", "Fre-Res": "fre-res", "adaptive": "adaptive"}
LEVERS = (
    ("cudnn", "flash", "cudnn_over_flash", "ttft_s"),
    ("cudnn", "flash_in_small_chunks", "cudnn_over_flash_in_small_chunks", "ttft_s"),
    ("cudnn", "in_passes", "fused_over_in_passes", "ttft_s"),
    ("recorded", "eager", "recorded_over_eager", "tpot_s"),
    ("recorded_later", "eager", "recorded_later_over_eager", "tpot_s"),
    ("recorded", "recorded_in_passes", "recorded_fused_over_in_passes", "tpot_s"),
)


def measured_rows():
    return {row["name"]: row for row in read_part("cuda", "table_3")["rows"]}


def test_the_tables_on_a_gpu_are_those_of_the_file():
    costs, levers = tables_after("**On a GPU.**")[:2]
    found = measured_rows()
    for name, *cells in costs[2:]:
        row = found[ROWS[name]]
        times = (row["ttft_s"], row["floor"]["ttft_s"])
        ttft, least = (f"{seconds:.{2 if seconds < 10 else 1}f} s" for seconds in times)
        peak, weights = (f"{b / 1e9:.1f} GB" for b in (row["peak_memory_bytes"], row["floor"]["memory_bytes"]))
        assert cells[:5] == [f"{row['context_tokens']:,}", ttft, least, peak, weights], name
    part = read_part("cuda", "levers")
    for (_, *cells), (on, off, ratio, key) in zip(levers[1:], LEVERS, strict=True):
        unit, places, scale = ("s", 2, 1) if key == "ttft_s" else ("ms", 1, 1000)
        values = [f"{scale * part[name][key]['median']:.{places}f} {unit}" for name in (on, off)]
        spread = part[ratio]
        assert [cell.removesuffix(" a token") for cell in cells[:2]] == values
        told = f"({spread['min']:.2f} to {spread['max']:.2f})" if "min" in spread else "of the medians"
        assert cells[2].replace(",", "") == f"{spread['median']:.2f}x {told}"


def test_the_tables_of_encoding_on_a_gpu_are_those_of_the_file():
    (_, (_, *cells)), (_, *methods) = tables_after("**Encoding on a GPU.**")[:2]
    part = read_part("cuda", "clip")

    def with_spread(name):
        return "{median:.2f}x ({min:.2f} to {max:.2f})".format(**part[name])

    seconds = [f"{part['seconds'][name]['median']:.2f} s" for name in ("encoding_alone", "encoding_in_passes")]
    assert cells == [*seconds, with_spread("encoding_alone_over_in_passes")]
    for (_, *ratios), name in zip(methods, ("adaptive", "fre_res"), strict=True):
        assert ratios == [with_spread(f"{name}{how}_over_encoding_alone") for how in ("", "_in_one_queue")]


def test_a_plan_says_the_memory_that_was_measured(tmp_path):
    model = Models(ModelSource(str(write_weightless("Qwen3-VL-8B", tmp_path)), CPU, is_random=True)).prompt_counter
    model.half.to(torch.bfloat16)
    sizes, found = measure_decoder(model), measured_rows()
    for name in ROWS.values():
        row = found[name]
        rows = row["context_tokens"]
        chunk = row["prefill_chunk_tokens"]
        assert LEAST_CHUNK_TOKENS <= chunk <= LONG_CHUNK_TOKENS and is_long_prompt(model, rows, is_cuda=True)
        parts = ask_parts(sizes, row["visual_tokens"], rows, chunk, 2, is_cuda=True, mlp_rows=PART_ROWS)
        planned = sum_bytes(parts, is_cuda=True)
        assert abs(planned / row["peak_memory_bytes"] - 1) < 0.01, (name, planned, row["peak_memory_bytes"])
