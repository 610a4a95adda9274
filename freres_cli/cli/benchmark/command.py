"""Measure the figures in the README: ``python -m freres_cli.cli.benchmark -o FILE [PART ...]`` writes one JSON file.

Parts: ``method`` (cost after encoding against encoding at a released model's widths), ``decode`` (against plain PyAV),
``memory`` (one and ten minutes of 30 fps video), ``bounded`` (adaptive Fre-Res with less memory than a clip has latents,
against merging it as a whole), ``many`` (20 short clips with one command against 20 commands), ``questions`` (32 questions
together against one at a time), ``still`` (frames in which nothing moved), ``lean`` (the cache with spare rows, a saved
prefix, and prompts in chunks) and ``resize`` (a frame on one core). Takes about 20 minutes on two cores.

Only if they are named: ``peers`` (the cost of every method after encoding; it may take hours, and ``--frames`` makes its
clip shorter), ``startup`` (``compress`` and ``ask`` on a short clip, here and in ``--other CHECKOUT``, in turn) and ``hours``
(memory against the length of the video, for ``--minutes``). ``kills`` (workers and drivers of ``freres batch`` killed at
random moments), ``actors`` (one worker against two) and ``storage`` (bytes of a token in a bundle) go to ``batch.json``,
``levers`` (file to first token with each way to encode faster, on ``--frames``) and ``grids`` (accuracy with smaller grids
for residual frames, on each ``--questions``) to ``speed.json``, as does ``lines`` (``line_levels``: speed and accuracy, on
both); ``quantized`` (cache and weights in 8 bits, on each ``--questions``; needs torchao) to ``quantized.json``; ``choices``
(constants of adaptive Fre-Res against others; ``--clips`` keeps its clips and answers) to ``choices.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from freres_cli.bench.report import describe_environment
from freres_cli.cli.benchmark.batch import measure_actors, measure_kills, measure_storage
from freres_cli.cli.benchmark.choices import measure_choices
from freres_cli.cli.benchmark.gpu import measure_gpu, measure_gpu_clip
from freres_cli.cli.benchmark.grids import measure_grids
from freres_cli.cli.benchmark.hours import measure_hours
from freres_cli.cli.benchmark.inputs import write_video
from freres_cli.cli.benchmark.lean import measure_lean
from freres_cli.cli.benchmark.levers import measure_levers
from freres_cli.cli.benchmark.lines import measure_lines
from freres_cli.cli.benchmark.peers import measure_peers
from freres_cli.cli.benchmark.pipeline import (
    measure_bounded,
    measure_decode,
    measure_many,
    measure_memory,
    measure_method,
)
from freres_cli.cli.benchmark.quantized import measure_quantized
from freres_cli.cli.benchmark.questions import measure_questions
from freres_cli.cli.benchmark.resize import measure_resize
from freres_cli.cli.benchmark.startup import measure_startup
from freres_cli.cli.benchmark.still import measure_still
from freres_cli.cli.output import print_result
from freres_cli.devices import choose_device

USUAL = "method, decode, memory, bounded, many, questions, still, lean, resize"
ONLY_IF_NAMED = (
    "peers",
    "startup",
    "hours",
    "kills",
    "actors",
    "storage",
    "levers",
    "gpu_clip",
    "grids",
    "lines",
    "quantized",
    "choices",
    "gpu",
)
# Parts with a file of their own.
NAMED_ALONE = ("hours", "quantized", "choices", "gpu")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m freres_cli.cli.benchmark", description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--frames", type=int, default=1800, help="frames of the clip that peers, levers and lines measure"
    )
    parser.add_argument(
        "--questions",
        type=Path,
        action="append",
        default=[],
        help="a questions file that grids, lines and quantized ask",
    )
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), help="those that peers measures; by default all"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="most seconds for a method that peers measures")
    parser.add_argument("--clips", type=Path, help="folder in which choices keeps its clips and answers, to go on from")
    parser.add_argument("--other", type=Path, help="the checkout that startup compares with this one")
    parser.add_argument(
        "--minutes",
        type=int,
        nargs="+",
        default=[10, 60, 180],
        help="lengths that hours measures, each a multiple of 10",
    )
    parser.add_argument("parts", nargs="*", default=[], help=f"{USUAL}; and, if named, {', '.join(ONLY_IF_NAMED)}")
    return parser.parse_args()


def main() -> None:
    """Run the named parts and write their results; the file keeps the results it has for other parts."""
    arguments = _parse_arguments()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        measures = {
            "method": measure_method,
            "decode": lambda: measure_decode(Path(folder)),
            "memory": lambda: measure_memory(Path(folder)),
            "bounded": lambda: measure_bounded(Path(folder)),
            "many": lambda: measure_many(Path(folder)),
            "questions": lambda: measure_questions(Path(folder)),
            "still": lambda: measure_still(Path(folder)),
            "lean": lambda: measure_lean(Path(folder)),
            "resize": measure_resize,
            "peers": lambda: measure_peers(arguments.frames, arguments.limit, arguments.methods),
            "levers": lambda: measure_levers(
                write_video(Path(folder) / "minute.mp4", arguments.frames, (1280, 720)), Path(folder), arguments.frames
            ),
            "lines": lambda: measure_lines(Path(folder), arguments.frames, arguments.questions),
            "grids": lambda: measure_grids(arguments.questions),
            "quantized": lambda: measure_quantized(arguments.questions),
            "choices": lambda: measure_choices(arguments.clips or Path(folder)),
            "gpu": measure_gpu,
            "gpu_clip": measure_gpu_clip,
            "startup": lambda: measure_startup(Path(folder), arguments.other),
            "hours": lambda: measure_hours(Path(folder), arguments.minutes),
            "kills": lambda: measure_kills(Path(folder)),
            "actors": lambda: measure_actors(Path(folder)),
            "storage": lambda: measure_storage(Path(folder)),
        }
        for part in arguments.parts or [part for part in measures if part not in ONLY_IF_NAMED]:
            results["environment"] = describe_environment(choose_device("cpu"))
            named = " ".join(["", *arguments.parts])
            place = f"freres_cli/bench/results/{arguments.output.name}"
            results["command"] = f"python -m freres_cli.cli.benchmark -o {place}{named if part in NAMED_ALONE else ''}"
            results[part] = measures[part]()
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
            print_result(f"{part}: done")
