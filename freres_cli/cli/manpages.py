"""The manual pages, written from the command itself: ``python -m freres_cli.cli.manpages [--check]``.

Pages of section 1 come from the verbs, and freres-preset(5) from ``presets.KEYS``. Four things in pages that are edited by
hand are generated: the header, PRESETS, EXIT STATUS and SEE ALSO of freres(7), and the tables of freres-bundle(5), which
come from ``tracks.COLUMNS``. Typer vendors Click, so the commands are only walked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import typer
import yaml

from freres_cli import __version__
from freres_cli.cli.app import app
from freres_cli.cli.manual import VERBS
from freres_cli.cli.roff import code, escape, line, tagged
from freres_cli.errors import ExitStatus
from freres_cli.presets import KEYS, Key, load_preset, preset_names
from freres_cli.tracks import COLUMNS, TOKEN_COLUMNS, Column

MAN_DIR = Path(__file__).parents[2] / "man"
NOTICE = '.\\" Written by python -m freres_cli.cli.manpages; edit that file, not this one.\n'
OVERVIEW_NOTICE = (
    '.\\" Header, PRESETS, EXIT STATUS and SEE ALSO: python -m freres_cli.cli.manpages. The rest is edited here.\n'
)

EXIT_MEANINGS = {
    "DONE": "Done.",
    "BUG": "A bug in freres. `FRERES_DEBUG=1` shows where.",
    "USAGE": "A flag, argument, preset or setting that cannot be carried out, or an output that cannot be written.",
    "VIDEO": "The video is missing, is not a video, or cannot be decoded.",
    "BUNDLE": "The bundle is missing, damaged or unsafe, or was made by another method than the verb needs.",
    "BACKBONE": "The model cannot be found, loaded, or used for what is asked; or it is not the model of the bundle.",
    "RESOURCE": "Not enough memory or disk, or a device that is not there.",
    "INTERRUPTED": "Interrupted with Ctrl-C. No half-written file is left.",
}

# What an option without a default of its own falls back to.
DEFAULTS = {
    "budget": "the preset's",
    "preset": "bundled for the bundled model, else qwen2-vl-7b",
    "model": "bundled",
    "revision": "the hub's main branch",
    "device": "auto (CUDA where there is one, else the CPU)",
    "dtype": "auto (float32 for small models on the CPU, else as the checkpoint is stored)",
    "attn": "auto (flash kernels where they are installed and fit, else PyTorch's own, exact on the CPU)",
    "deepstack": "the preset's",
}


# A legal value of each key, for freres-preset(5); read as text.
KEY_EXAMPLES: dict[str, str] = yaml.load(
    """{description: one line, budget_tokens: 1280, sample: fps, sample_fps: 1, sample_count: 16, track_density: 4,
    grid: 24x24, tokens_per_frame: 256, variant: anchors, anchors: 4, keep_per_block: 8, temporal_share: 0.3,
    static_per_gop: 0, pooled_side: 6, max_coefficients: 5, events: false, tau: 0.25, text_after: hf,
    deepstack: drop}""",
    yaml.BaseLoader,
)
EXAMPLE_PRESET = """\
# Lectures: few cuts, slow motion.
description: lectures, one frame a second
budget_tokens: 1280
sample: fps
sample_fps: 1
grid: 16x16
anchors: 6
temporal_share: 0.3
tau: auto
"""


def head(name: str, section: int, title: str) -> str:
    """Return notice, header and NAME. There is no date: the version says enough, and builds stay equal."""
    return (
        f'{NOTICE}.TH {escape(name.upper())} {section} "" "freres {__version__}" "freres manual"\n'
        f".nh\n.ad l\n.SH NAME\n{escape(name)} \\- {line(title[0].lower() + title[1:].rstrip('.'))}"
    )


def see_also(*pages: str) -> str:
    """Return the last section, in the order of sections and names."""
    found = sorted(set(pages) | {"freres-bundle(5)", "freres-preset(5)"}, key=lambda page: (page[-3:], page))
    return ".SH SEE ALSO\n" + ",\n".join(f".BR {escape(page[:-3])} {page[-3:]}" for page in found) + "\n"


def exit_status() -> str:
    """Return the EXIT STATUS section, from the enum."""
    rows = (tagged(f".B {status.value}", EXIT_MEANINGS[status.name]) for status in ExitStatus)
    return ".SH EXIT STATUS\n" + "".join(rows)


def _type_name(parameter: Any, context: Any) -> str:
    shown = parameter.metavar or parameter.display_type(context).replace(" range", "")
    return str(shown)


def _facts(parameter: Any, defaults: Mapping[str, str]) -> Iterable[str]:
    """Yield what the help line does not say: range, choices, repetition, default, environment."""
    low, high = parameter.min, parameter.max
    if low is not None or high is not None:
        yield f"At least {low:g}." if high is None else f"At most {high:g}." if low is None else f"{low:g} to {high:g}."
    if parameter.type_descriptor.is_choice and parameter.metavar:
        yield f"One of {', '.join(map(str, parameter.type_descriptor.choices))}."
    if getattr(parameter, "multiple", False) and "again" not in (parameter.help or ""):
        yield "May be given more than once."
    if parameter.envvar:
        yield f"Environment: {parameter.envvar}."
    if parameter.required:
        yield "Required."
    elif parameter.default is not None and parameter.default is not False:
        yield f"Default: {'on' if parameter.default is True else getattr(parameter.default, 'value', parameter.default)}."
    elif parameter.name in defaults and not getattr(parameter, "is_flag", False):
        yield f"Default: {defaults[parameter.name]}."


def option(parameter: Any, context: Any, defaults: Mapping[str, str]) -> str:
    """Return the tagged paragraph of one option: short form first, negative forms after it, its value in italics."""
    value = "" if parameter.is_flag or parameter.count else f" \\fI{escape(_type_name(parameter, context))}\\fR"
    forms = [
        ", ".join(f"\\fB{escape(name)}\\fR" for name in sorted(names, key=len)) + value
        for names in (parameter.opts, parameter.secondary_opts)
        if names
    ]
    return tagged(" / ".join(forms), " ".join([parameter.help or "", *_facts(parameter, defaults)]))


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


def leaf_commands(group: Any) -> dict[str, Any]:
    """Return every verb by name; those of a group by its name and theirs: ``world make``."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = leaf_commands(command) if hasattr(command, "commands") else {}
        found |= {f"{name} {sub}": leaf for sub, leaf in inner.items()} or {name: command}
    return found


def page_name(verb: str) -> str:
    """Return the name of a verb's page; a verb within a verb has a hyphen in it."""
    return f"freres-{verb.replace(' ', '-')}"


def verb_page(name: str, command: Any, parent: Any) -> str:
    """Return freres-NAME(1); the name of a verb within a verb has a space, its page a hyphen."""
    if name not in VERBS:
        raise SystemExit(f"manpages: no examples and no output for 'freres {name}': add them to manual.VERBS")
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    facts = VERBS[name]
    defaults = {**DEFAULTS, **facts.get("defaults", {})}
    texts = command.help.strip().split("\n\n")
    page = head(page_name(name), 1, texts[0]) + synopsis(command, context, f"freres {name}")
    page += ".SH DESCRIPTION\n" + ".PP\n".join(map(line, texts))
    for i, argument in enumerate(visible(command, context, "argument")):
        page += ".SH ARGUMENTS\n" * (i == 0)
        page += tagged(_argument_name(argument), " ".join([argument.help or "", *_facts(argument, defaults)]))
    page += ".SH OPTIONS\n" + "".join(option(o, context, defaults) for o in visible(command, context, "option"))
    page += ".SH EXAMPLES\n" + ".PP\n".join(line(meaning) + code(text) for text, meaning in facts["examples"].items())
    page += f".SH OUTPUT\n{line(facts['output'])}"
    for schema, keys in facts["schemas"].items():
        schema, _, when = schema.partition(" ")
        said = f"`--json` {when}".strip() + f" prints one document of schema `{schema}`. Main keys:"
        page += f".PP\n{line(said)}" + code("\n".join(wrap(keys, 66)))
    return page + exit_status() + see_also("freres(1)", "freres(7)")


def command_page(group: Any, context: Any) -> str:
    """Return freres(1)."""
    page = head("freres", 1, group.help) + ".SH SYNOPSIS\n\\fBfreres\\fR \\fIVERB\\fR [OPTIONS] [ARGUMENTS]\n"
    page += (
        ".SH DESCRIPTION\n" + line(f"{group.help} freres(7) is the overview, with a worked example.") + ".SH VERBS\n"
    )
    verbs = leaf_commands(group)
    for name, command in verbs.items():
        page += tagged(f".B {escape(name)}", command.help.split("\n\n")[0] + f" See {page_name(name)}(1).")
    page += ".SH OPTIONS\n" + "".join(option(o, context, {}) for o in visible(group, context, "option"))
    page += ".SH OUTPUT\n" + line(
        "The result, and only the result, goes to stdout; progress, notes and warnings go to stderr. With `--json` a verb "
        "prints one document, named by its `schema` key; verbs that work through a list print one document a line. Figures "
        "that are not known are null. On failure stderr says what is wrong (error:) and what to do (hint:)."
    )
    return page + exit_status() + see_also("freres(3)", "freres(7)", *(f"{page_name(name)}(1)" for name in verbs))


def overview_page(path: Path, verbs: Iterable[str]) -> str:
    """Return freres(7) as it stands at ``path``, with the parts that follow from the code written anew."""
    presets = (load_preset(name) for name in preset_names())
    fresh = {
        "PRESETS": ".SH PRESETS\n"
        + "".join(tagged(f".B {escape(p.name)}", f"{p.values['description']}.") for p in presets),
        "EXIT STATUS": exit_status(),
        "SEE ALSO": see_also("freres(1)", "freres(3)", *(f"{page_name(name)}(1)" for name in verbs)),
    }
    _, *sections = re.split(r"(?m)^\.SH (?!NAME)", path.read_text(encoding="utf-8"))
    kept = (fresh.pop(section.partition("\n")[0], f".SH {section}") for section in sections)
    page = head("freres", 7, "video made cheap for video language models: an overview") + "".join(kept)
    return (page + "".join(fresh.values())).replace(NOTICE, OVERVIEW_NOTICE)


def _rule(key: Key) -> str:
    kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[key.kind]
    text = f"one of {', '.join(key.choices)}" if key.choices else kind
    if key.low is not None:
        text += f", at least {key.low:g}" if key.high is None else f", {key.low:g} to {key.high:g}"
    return text + (", or auto" if key.optional and "auto" in key.help else "")


def preset_page() -> str:
    """Return freres-preset(5), from the table that also checks presets."""
    page = head("freres-preset", 5, "settings of freres, in YAML") + ".SH DESCRIPTION\n"
    page += line(
        "A preset is a YAML mapping of the keys below. A key that is absent has its default; an unknown key, or a value of "
        "the wrong type or out of range, is an error (exit status 2). `freres compress --preset` takes the name of a "
        "shipped preset or a file ending in .yaml or .yml; `--set KEY=VALUE` overrides one key."
    )
    page += ".SH KEYS\n"
    for name, key in KEYS.items():
        none = "empty" if not key.optional else "auto" if "auto" in key.help else "none"
        default = str(key.default).lower() if isinstance(key.default, bool) else key.default
        page += tagged(f".B {escape(name)}", f"{key.help[0].upper()}{key.help[1:]}.") + ".br\n"
        page += line(f"Value: {_rule(key)}. Default: {none if default in (None, '') else default}.") + ".br\n"
        page += line(f"Example: `{name}: {KEY_EXAMPLES[name]}`")
    page += ".SH NOTES\n" + line(
        "`sample: fps` needs `sample_fps`, `sample: count` needs `sample_count`. `anchors` is the number at the preset's own "
        "budget; it scales with the budget asked for. With `grid` given as ROWSxCOLUMNS, `tokens_per_frame` has no effect."
    )
    page += ".SH EXAMPLE\n" + line("A preset of your own, lectures.yaml:") + code(EXAMPLE_PRESET) + ".PP\n"
    page += line("and how to use it:") + code("freres compress talk.mp4 --preset lectures.yaml")
    return page + see_also("freres-compress(1)", "freres-presets(1)", "freres(7)")


def bundle_page(path: Path) -> str:
    """Return freres-bundle(5) as it stands at ``path``, with the tables of tensors written anew."""
    tables = {**COLUMNS, **TOKEN_COLUMNS}
    mark = re.compile(r'(?ms)^(\.\\" table: ([a-z ]+)\n)\.TS\n.*?^\.TE\n')
    return mark.sub(lambda found: found[1] + _column_table(tables, found[2].split()), path.read_text(encoding="utf-8"))


def _column_table(columns: Mapping[str, Column], tables: list[str]) -> str:
    rows = [(name, column) for name, column in columns.items() if column.table in tables]
    lines = (f"{name}\t{column.dtype} ({_axes(column)})\t{escape(column.text)}".rstrip() for name, column in rows)
    return ".TS\nl2 l2 l.\n" + "".join(f"{line}\n" for line in lines) + ".TE\n"


def _axes(column: Column) -> str:
    return ", ".join(({"frame": "T", "gop": "G"}.get(column.table, "n"), *column.shape))


def build_pages() -> dict[str, str]:
    """Return every generated page by its path below ``man``."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("freres", [], resilient_parsing=True)
    verbs = leaf_commands(group)
    pages = {"man1/freres.1": command_page(group, context)}
    pages |= {f"man1/{page_name(name)}.1": verb_page(name, command, context) for name, command in verbs.items()}
    return pages | {
        "man5/freres-bundle.5": bundle_page(MAN_DIR / "man5/freres-bundle.5"),
        "man5/freres-preset.5": preset_page(),
        "man7/freres.7": overview_page(MAN_DIR / "man7/freres.7", verbs),
    }


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
