"""The manual pages, written from the command itself: ``python -m freres_cli.cli.manpages [--check]``.

Pages of section 1 come from the verbs, freres-preset(5) from ``presets.KEYS``, freres(7) from the text below, presets and exit
statuses. freres-bundle(5) is a specification and is written by hand. Typer vendors Click: the commands are only walked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from freres_cli import __version__
from freres_cli.cli.app import app
from freres_cli.errors import ExitStatus
from freres_cli.presets import KEYS, Key, load_preset, preset_names

MAN_DIR = Path(__file__).parents[2] / "man"
NOTICE = '.\\" Written by python -m freres_cli.cli.manpages; edit that file, not this one.\n'

EXIT_MEANINGS = {
    "DONE": "Done.",
    "BUG": "A bug in freres. `FRERES_DEBUG=1` shows where.",
    "USAGE": "A flag, argument, preset or setting that cannot be carried out. Nothing was done.",
    "VIDEO": "The video is missing, is no video, or cannot be decoded.",
    "BUNDLE": "The bundle is missing, damaged, unsafe or there already, or its place cannot be written.",
    "BACKBONE": "The model cannot be found, loaded, or used for what is asked; or it is not the one of the bundle.",
    "RESOURCE": "Not enough memory or disk, or a device that is not there.",
    "INTERRUPTED": "Interrupted with Ctrl-C. No half-written file is left.",
}

# What an option without a default of its own falls back to.
FALLBACKS = {
    "budget": "the preset's",
    "preset": "bundled for the bundled model, else qwen2-vl-7b",
    "model": "bundled",
    "revision": "the hub's main branch",
    "device": "auto: CUDA where there is one, else the CPU",
    "dtype": "auto: float32 for small models on the CPU, else as the checkpoint is stored",
}


@dataclass(frozen=True)
class Verb:
    """What a page says beyond the command: examples (line, meaning), plain output, ``--json`` schemas and their keys."""

    examples: tuple[tuple[str, str], ...]
    output: str
    schemas: Mapping[str, str]
    fallbacks: Mapping[str, str] = field(default_factory=dict)


COUNTS = "visual_tokens budget_tokens full_tokens compression tokens_by_kind"
VERBS = {
    "compress": Verb(
        (
            ("freres compress video.mp4 --budget 1280", "Write bundle.pt with at most 1,280 visual tokens."),
            ("freres compress video.mp4 --preset qwen2-vl-7b --model Qwen/Qwen2-VL-7B-Instruct", "For a larger model."),
            ("freres compress video.mp4 --start 60 --end 90 --fps 10 -o part.pt", "Half a minute, 10 frames a second."),
            ("freres compress video.mp4 --budget 1280 --dry-run", "Show the token allocation; encode nothing."),
            ("freres compress video.mp4 --set temporal_share=0.4", "Change one setting of the preset."),
        ),
        "The bundle's path. Token counts, time and peak memory go to stderr.",
        {
            "freres.compress/1": f"bundle bundle_bytes {COUNTS} retention timings_s peak_memory_bytes model source sampling "
            "settings notes environment",
            "freres.plan/1": f"{COUNTS} frames baseline_frames grid num_gops num_coefficients is_lossless settings",
        },
        {
            "variant": "the preset's",
            "fps": "the preset's sample",
            "frames": "the preset's sample",
            "grid": "the preset's",
            "start": "the beginning of the video",
            "end": "the end of the video",
        },
    ),
    "ask": Verb(
        (
            ('freres ask bundle.pt "What moves first?"', "Stream an answer."),
            ('freres ask bundle.pt "Which way?" --choices "left|right"', "Choose an option; print probabilities."),
            ("freres ask bundle.pt", "Read questions line by line; the video is prefilled once."),
            ("freres ask bundle.pt - --json < question.txt", "Read the question from stdin; print one document."),
        ),
        "The answer; with --choices, a line for each option with its probability. Costs go to stderr.",
        {
            "freres.ask/1": "bundle question answer choices visual_tokens context_tokens new_tokens ttft_s cold_ttft_s tpot_s "
            "load_s finish_reason model text_after notes environment"
        },
        {
            "choices": "none: a free answer",
            "model": "the one recorded in the bundle",
            "revision": "the one recorded in the bundle",
            "adapter": "none: the untrained pipeline",
            "text_after": "the one recorded in the bundle",
        },
    ),
    "profile": Verb(
        (
            ("freres profile bundle.pt", "Prefill, TTFT, TPOT and memory of a bundle beside the full-token run."),
            ("freres profile video.mp4 --budget 1280 --repeat 5", "With decode, encode and compress as well."),
            ("freres profile --json > profile.json", "A made clip; every figure with its spread."),
        ),
        "A table, a row for Fre-Res and one for the full-token run of the same model. Figures are medians. A row's state is ok, "
        "out_of_memory, context_exceeded or timed_out.",
        {"freres.profile/1": "target question repeat warmup model rows environment"},
        {"model": "bundled; for a bundle, the one recorded in it", "revision": "as for --model"},
    ),
    "inspect": Verb(
        (
            ("freres inspect bundle.pt", "What is inside, and where each setting came from."),
            ("freres inspect bundle.pt --tokens", "One more row for each visual token."),
        ),
        "Source, model, tokens, residual energy kept, GoPs and settings. A spectrum is shown beside its null: what independent "
        "noise frames would give.",
        {
            "freres.inspect/1": f"bundle bundle_bytes bytes_per_token model source sampling geometry settings {COUNTS} retention "
            "history energy gops tokens"
        },
    ),
    "repack": Verb(
        (("freres repack bundle.pt --budget 320 -o small.pt", "Cut a bundle to 320 visual tokens."),),
        "The new bundle's path. Token counts go to stderr.",
        {"freres.repack/1": f"bundle bundle_bytes source_bundle {COUNTS} retention notes"},
    ),
    "presets": Verb(
        (
            ("freres presets", "List the presets."),
            ("freres presets qwen2-vl-7b > mine.yaml", "Begin a preset of your own; use it with --preset mine.yaml."),
        ),
        "A table of presets, or one preset as YAML.",
        {"freres.presets/1": "presets", "freres.preset/1": "name settings"},
    ),
    "models": Verb(
        (("freres models", "List model families and checkpoints."),),
        "A table: tokens of a frame, bytes of key-value cache and of bundle for each token, and whether real weights were run.",
        {"freres.models/1": "families bundled checkpoints"},
    ),
    "doctor": Verb(
        (("freres doctor", "Check this machine."),),
        "A line for each part: ok, limited or missing, and what that means.",
        {"freres.doctor/1": "findings"},
    ),
    "demo": Verb(
        (
            ("freres demo", "Run the whole job on a made clip."),
            ("freres demo -o here", "Keep the clip and the bundles in the folder here."),
        ),
        "Three tables: token counts, answers beside the truth, cost beside the full-token run.",
        {"freres.demo/1": "clip bundles answers profile environment"},
        {"output": "a temporary folder, removed at the end"},
    ),
}

PRESET_EXAMPLES = {
    "description": "lectures, one frame a second",
    "budget_tokens": "1280",
    "sample": "fps",
    "sample_fps": "1",
    "sample_count": "16",
    "track_density": "4",
    "grid": "24x24",
    "tokens_per_frame": "256",
    "variant": "anchors",
    "anchors": "4",
    "keep_per_block": "8",
    "temporal_share": "0.3",
    "static_per_gop": "0",
    "pooled_side": "6",
    "max_coefficients": "5",
    "events": "false",
    "tau": "0.25",
    "text_after": "hf",
}
EXAMPLE_PRESET = """\
# Lectures: few cuts, slow motion.
description: lectures, one frame a second
budget_tokens: 1280
sample: fps
sample_fps: 1
track_density: 2
grid: 16x16
anchors: 6
temporal_share: 0.3
tau: auto
"""

WORKED_EXAMPLE = """\
$ freres compress video.mp4 --budget 1280
$ freres ask bundle.pt "What moves first?"
$ freres profile bundle.pt
$ freres inspect bundle.pt
$ freres repack bundle.pt --budget 320 -o small.pt
$ freres ask small.pt "What moves first?" --choices "a car|a dog"
"""
# freres(7): heading -> paragraphs; a pair is a tagged paragraph.
OVERVIEW: dict[str, list[str | tuple[str, str]]] = {
    "DESCRIPTION": [
        "freres makes video cheap for video language models. It compresses a video once into a bundle, a file of at most a "
        "given number of visual tokens, and answers questions from the bundle alone, without the video and without the vision "
        "tower. The method follows the Fre-Res paper (arXiv 2605.16366): sparse full-detail frames, and a few temporal DCT "
        "coefficients of the frames between them.",
    ],
    "PIPELINE": [
        "video, frames, latents, tracks, bundle; then bundle, tokens, answer.",
        (
            "decode",
            "Frames are read at the sampling of the preset, rotated and resized to the token grid. Sound is not read.",
        ),
        (
            "encode",
            "Each frame passes the model's frozen vision tower on its own and gives a latent for each grid cell.",
        ),
        (
            "group",
            "Evenly spaced frames become anchor frames, and so do frames that start something new. A group of pictures (GoP) is "
            "an anchor frame and the residual frames up to the next one. No residual crosses a cut.",
        ),
        (
            "compress",
            "Anchor frames keep their tokens of most energy, by default 8 of 9 in each block of 3x3. Residuals, latents less "
            "those of their anchor frame, are pooled to cells and transformed along time (DCT-II). The coefficients of most "
            "energy in the whole clip are kept.",
        ),
        ("write", "Anchor tokens, coefficients and their places become a bundle, freres-bundle(5)."),
        (
            "ask",
            "Coefficients become tokens again. All tokens enter the prompt of the language model in order of time, each at its "
            "own place. The video is prefilled once for any number of questions.",
        ),
    ],
    "TOKEN KINDS": [
        ("anchor", "A token of an anchor frame, as the model made it."),
        (
            "dynamic",
            "A cell at an instant: its anchor and its kept coefficients, evaluated there. A cell with m coefficients gives m.",
        ),
        ("static", "The mean over time of a calm background cell, which keeps no coefficient."),
        ("summary", "The mean of a GoP over its cells, one for a GoP."),
    ],
    "SETTINGS": [
        "A setting is taken from the first that names it: flag, environment, preset, default. The environment holds facts of the "
        "machine only (device, dtype). `--set KEY=VALUE` is a flag and takes every key of freres-preset(5). The bundle records "
        "each value and where it came from.",
    ],
    "ENVIRONMENT": [
        ("FRERES_DEVICE", "Default of --device: auto, cpu, cuda or cuda:N."),
        ("FRERES_DTYPE", "Default of --dtype: auto, float32, bfloat16 or float16."),
        ("FRERES_DEBUG", "1 shows the traceback of a failure instead of its message."),
        ("HF_HUB_OFFLINE", "1 forbids downloads: a model named by id must have been downloaded before."),
        ("HF_HOME", "Where models of the hub are kept."),
    ],
    "NUMBERS": [
        (
            "budget",
            "Most visual tokens given to the language model. Exact: never more. Text and special tokens do not count.",
        ),
        (
            "full tokens",
            "Visual tokens of the same clip without compression: frames the model would read, times its grid.",
        ),
        ("compression", "Full tokens over visual tokens, 1 or more."),
        ("retention", "Visual tokens over full tokens, in (0, 1]."),
        ("prefill", "Seconds of the prompt pass over system text and video."),
        ("TTFT", "Seconds from the question's submission to the first token out; bundle and model are loaded."),
        ("next TTFT", "The same for a further question: the video is prefilled already."),
        ("cold TTFT", "TTFT with the loading of bundle and model."),
        ("TPOT", "Mean seconds of each further token."),
        (
            "peak memory",
            "Most memory held over the measured span, which begins with a reset: allocated on a CUDA device, resident in the "
            "process on the CPU. Clocks wait for the device at both ends.",
        ),
        (
            "energy kept",
            "Share of residual energy that the kept coefficients hold. It does not say how well a model answers.",
        ),
    ],
    "LIMITS": [
        "What falls between two sampled frames is not seen. Sound and subtitles are not read; of several video streams one is "
        "read. A bundle belongs to the model that made it: another vision tower or projector is refused. Trained modules are "
        "optional (`--adapter`); without them tokens enter the model as the backbone made them. The bundled model is small and "
        "shows the pipeline, not quality. `freres models` says which real checkpoints were run, `freres doctor` what this "
        "machine can run.",
    ],
}


def escape(text: str) -> str:
    """Return text that groff shows as it stands: hyphens, quotes and backslashes are what they were."""
    for char, code in {"\\": "\\e", "-": "\\-", "'": "\\(aq", '"': "\\(dq", "^": "\\(ha", "~": "\\(ti"}.items():
        text = text.replace(char, code)
    return "".join(char if ord(char) < 128 else f"\\[u{ord(char):04X}]" for char in text)


def line(text: str) -> str:
    """Return one input line of prose; `words` in backticks are bold, and none begins with a control character."""
    parts = re.split(r"`([^`]*)`", " ".join(text.split()))
    out = "".join(f"\\fB{escape(part)}\\fR" if i % 2 else escape(part) for i, part in enumerate(parts))
    return f"\\&{out}\n" if out.startswith(".") else f"{out}\n"


def tagged(tag: str, text: str) -> str:
    """Return a tagged paragraph; the tag is roff."""
    return f".TP\n{tag}\n{line(text)}"


def code(text: str) -> str:
    """Return lines shown as they stand."""
    rows = (f"\\&{escape(row)}\n" for row in text.splitlines())
    return f".PP\n.RS 4\n.nf\n{''.join(rows)}.fi\n.RE\n"


def head(name: str, section: int, title: str) -> str:
    """Return notice, header and NAME. There is no date: the version says enough, and builds stay equal."""
    return (
        f'{NOTICE}.TH {escape(name.upper())} {section} "" "freres {__version__}" "freres manual"\n'
        f".SH NAME\n{escape(name)} \\- {line(title)}"
    )


def see_also(*pages: str) -> str:
    """Return the last section, in the order of sections and names."""
    names = sorted(set(pages), key=lambda page: (page.partition("(")[2], page))
    return (
        ".SH SEE ALSO\n" + ",\n".join(f".BR {escape(p.partition('(')[0])} ({p.partition('(')[2]}" for p in names) + "\n"
    )


def exit_status() -> str:
    """Return the EXIT STATUS section, from the enum."""
    rows = (tagged(f".B {status.value}", EXIT_MEANINGS[status.name]) for status in ExitStatus)
    return ".SH EXIT STATUS\n" + "".join(rows)


def _type_name(parameter: Any, context: Any) -> str:
    shown = parameter.metavar or parameter.display_type(context).replace(" range", "")
    return str(shown)


def _facts(parameter: Any, fallbacks: Mapping[str, str]) -> Iterable[str]:
    """Yield what the help line does not say: range, choices, repetition, default, environment."""
    low, high = parameter.min, parameter.max
    if low is not None or high is not None:
        yield f"At least {low:g}." if high is None else f"At most {high:g}." if low is None else f"{low:g} to {high:g}."
    if parameter.type_descriptor.is_choice:
        yield f"One of {', '.join(map(str, parameter.type_descriptor.choices))}."
    if getattr(parameter, "multiple", False):
        yield "May be given more than once."
    if parameter.envvar:
        yield f"Environment: {parameter.envvar}."
    if parameter.required:
        yield "Required."
    elif parameter.default not in (None, False, ""):
        yield f"Default: {parameter.default}."
    elif parameter.name in fallbacks and not getattr(parameter, "is_flag", False):
        yield f"Default: {fallbacks[parameter.name]}."


def option(parameter: Any, context: Any, fallbacks: Mapping[str, str]) -> str:
    """Return the tagged paragraph of one option: short form first, negative forms after it, its value in italics."""
    value = "" if parameter.is_flag or parameter.count else f" \\fI{escape(_type_name(parameter, context))}\\fR"
    forms = [
        ", ".join(f"\\fB{escape(name)}\\fR" for name in sorted(names, key=len)) + value
        for names in (parameter.opts, parameter.secondary_opts)
        if names
    ]
    return tagged(" / ".join(forms), " ".join([parameter.help or "", *_facts(parameter, fallbacks)]))


def visible(command: Any, context: Any, kind: str) -> list[Any]:
    """Return the parameters that help shows: ``option`` or ``argument``."""
    found = [p for p in command.get_params(context) if not p.hidden]
    return [p for p in found if (type(p).__name__.endswith("Argument")) == (kind == "argument")]


def _argument_name(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]")
    return f"\\fI{escape(name)}\\fR" if argument.required else f"[\\fI{escape(name)}\\fR]"


def synopsis(command: Any, context: Any, path: str) -> str:
    """Return the SYNOPSIS: arguments, required options, then the rest."""
    parts = [f"\\fB{escape(path)}\\fR", *(_argument_name(a) for a in visible(command, context, "argument"))]
    required = [o for o in visible(command, context, "option") if o.required]
    parts += [f"\\fB{escape(o.opts[0])}\\fR \\fI{escape(_type_name(o, context))}\\fR" for o in required]
    return f".SH SYNOPSIS\n{' '.join([*parts, '[OPTIONS]'])}\n"


def verb_page(name: str, command: Any, parent: Any) -> str:
    """Return freres-NAME(1)."""
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    facts = VERBS[name]
    fallbacks = {**FALLBACKS, **facts.fallbacks}
    title, *rest = command.help.strip().split("\n\n")
    title = " ".join(title.split())
    page = head(f"freres-{name}", 1, title[0].lower() + title[1:].rstrip(".")) + synopsis(
        command, context, f"freres {name}"
    )
    page += ".SH DESCRIPTION\n" + ".PP\n".join(line(text) for text in [title, *rest])
    arguments = visible(command, context, "argument")
    page += ".SH ARGUMENTS\n" if arguments else ""
    for argument in arguments:
        page += tagged(_argument_name(argument), " ".join([argument.help or "", *_facts(argument, fallbacks)]))
    page += ".SH OPTIONS\n" + "".join(option(o, context, fallbacks) for o in visible(command, context, "option"))
    page += ".SH EXAMPLES\n" + "".join(line(meaning) + code(text) + ".PP\n" for text, meaning in facts.examples)
    page = page.removesuffix(".PP\n") + f".SH OUTPUT\n{line(facts.output)}"
    for schema, keys in facts.schemas.items():
        page += f".PP\n{line(f'With `--json`, one document of schema `{schema}` on stdout. Its main keys:')}"
        page += code("\n".join(_wrapped(keys)))
    return page + exit_status() + see_also("freres(1)", "freres(7)", "freres-bundle(5)", "freres-preset(5)")


def _wrapped(words: str, width: int = 66) -> list[str]:
    rows = [""]
    for word in words.split():
        rows = [*rows, ""] if len(rows[-1]) + len(word) >= width else rows
        rows[-1] = f"{rows[-1]} {word}".strip()
    return rows


def command_page(group: Any, context: Any) -> str:
    """Return freres(1)."""
    title = " ".join(group.help.split())
    page = head("freres", 1, title[0].lower() + title[1:].rstrip("."))
    page += ".SH SYNOPSIS\n\\fBfreres\\fR \\fIVERB\\fR [OPTIONS] [ARGUMENTS]\n"
    page += ".SH DESCRIPTION\n" + line(f"{title} freres(7) is the overview, with a worked example.") + ".SH VERBS\n"
    for name, command in group.commands.items():
        page += tagged(f".B {escape(name)}", command.help.split("\n\n")[0] + f" See freres-{name}(1).")
    page += ".SH OPTIONS\n" + "".join(option(o, context, {}) for o in visible(group, context, "option"))
    page += ".SH OUTPUT\n" + line(
        "The result, and only the result, goes to stdout; progress, notes and warnings go to stderr. With `--json` a verb prints "
        "one document, whose `schema` key names it; unknown figures are null. On failure stdout stays empty, and stderr says "
        "what is wrong (error:) and what to do (hint:)."
    )
    verbs = (f"freres-{name}(1)" for name in group.commands)
    return page + exit_status() + see_also(*verbs, "freres-bundle(5)", "freres-preset(5)", "freres(7)")


def overview_page(verbs: Iterable[str]) -> str:
    """Return freres(7)."""
    page = head("freres", 7, "video made cheap for video language models: an overview")
    for heading, paragraphs in OVERVIEW.items():
        page += f".SH {heading}\n"
        for i, item in enumerate(paragraphs):
            page += (
                tagged(f".B {escape(item[0])}", item[1]) if isinstance(item, tuple) else ".PP\n" * (i > 0) + line(item)
            )
        if heading == "PIPELINE":
            page += ".SH EXAMPLE\n" + line(
                "Compress once, then ask, measure, look inside, and cut to a smaller budget."
            )
            page += code(WORKED_EXAMPLE) + ".PP\n" + line("`freres demo` does the like on a clip made on the spot.")
        if heading == "SETTINGS":
            page += ".SH PRESETS\n"
            for preset in map(load_preset, preset_names()):
                page += tagged(f".B {escape(preset.name)}", f"{preset.values['description']}.")
    return (
        page
        + exit_status()
        + see_also("freres(1)", *(f"freres-{v}(1)" for v in verbs), "freres-bundle(5)", "freres-preset(5)")
    )


def _rule(key: Key) -> str:
    kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[key.kind]
    text = f"one of {', '.join(key.choices)}" if key.choices else kind
    if key.low is not None:
        text += f", at least {key.low:g}" if key.high is None else f", {key.low:g} to {key.high:g}"
    return text + (", or auto" if key.optional else "")


def preset_page() -> str:
    """Return freres-preset(5), from the table that also checks presets."""
    page = head("freres-preset", 5, "settings of freres, in YAML") + ".SH DESCRIPTION\n"
    page += line(
        "A preset is a YAML mapping of the keys below. A key that is absent has its default; an unknown key, a value of another "
        "type or out of range is an error (exit status 2). `freres compress --preset` takes the name of a shipped preset or a "
        "file ending in .yaml or .yml; `--set KEY=VALUE` sets one key over it."
    )
    page += ".SH KEYS\n"
    for name, key in KEYS.items():
        none = "auto" if key.optional else "empty"
        default = str(key.default).lower() if isinstance(key.default, bool) else key.default
        page += tagged(f".B {escape(name)}", f"{key.help[0].upper()}{key.help[1:]}.") + ".br\n"
        page += line(f"Value: {_rule(key)}. Default: {none if default in (None, '') else default}.") + ".br\n"
        page += line(f"Example: `{name}: {PRESET_EXAMPLES[name]}`")
    page += ".SH NOTES\n" + line(
        "`sample: fps` needs `sample_fps`, `sample: count` needs `sample_count`. `anchors` holds at the budget the preset names "
        "and scales with the budget asked for. `grid` named as ROWSxCOLUMNS leaves `tokens_per_frame` without effect."
    )
    page += ".SH EXAMPLE\n" + line("A preset of one's own, lectures.yaml:") + code(EXAMPLE_PRESET) + ".PP\n"
    page += line("and its use:") + code("freres compress talk.mp4 --preset lectures.yaml")
    return page + see_also("freres-compress(1)", "freres-presets(1)", "freres-bundle(5)", "freres(7)")


def build_pages() -> dict[str, str]:
    """Return every generated page by its path below ``man``."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("freres", [], resilient_parsing=True)
    verbs = list(group.commands)
    pages = {"man1/freres.1": command_page(group, context)}
    pages |= {f"man1/freres-{name}.1": verb_page(name, group.commands[name], context) for name in verbs}
    return pages | {"man5/freres-preset.5": preset_page(), "man7/freres.7": overview_page(verbs)}


def stale_pages(directory: Path = MAN_DIR) -> list[str]:
    """Return the pages that differ from what the code says, are missing, or belong to no verb."""
    pages = build_pages()
    found = {str(path.relative_to(directory)) for path in directory.glob("man1/*.1")}
    odd = [name for name in sorted(found | set(pages)) if name not in pages or not (directory / name).is_file()]
    differing = [n for n, page in pages.items() if n not in odd and (directory / n).read_text(encoding="utf-8") != page]
    return sorted([*odd, *differing])


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` name those that are stale; return the exit status."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m freres_cli.cli.manpages [--check]", file=sys.stderr)
        return ExitStatus.USAGE
    if arguments:
        stale = stale_pages()
        for name in stale:
            print(f"stale: man/{name}", file=sys.stderr)
        return ExitStatus.BUG if stale else ExitStatus.DONE
    for name, page in build_pages().items():
        path = MAN_DIR / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
