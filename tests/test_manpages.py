"""The manual pages say what the code does: every verb, option, setting, status, variable, tensor and manifest key."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import yaml

from freres_cli.cli import manpages
from freres_cli.cli.app import app
from freres_cli.errors import ExitStatus
from freres_cli.pipeline.compressor import Compressor
from freres_cli.presets import KEYS, check_value, preset_names

ROOT = Path(__file__).parents[1]
MAN = ROOT / "man"
PAGES = sorted(MAN.glob("man*/*.[1357]"))
GROUP: Any = typer.main.get_command(app)
CONTEXT = GROUP.make_context("freres", [], resilient_parsing=True)
COMMANDS: Any = manpages.leaf_commands(GROUP)
VERBS = sorted(COMMANDS)
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "freres_cli").rglob("*.py"))}


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


def plain(roff: str) -> str:
    """The words of a page: comments, font changes and escapes gone."""
    text = re.sub(r"(?m)^(\.\\\"|'\\\").*\n", "", roff)
    for code, char in {r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\&": "", r"\e": "\\"}.items():
        text = text.replace(code, char)
    return re.sub(r"\\f[BIR]", "", text)


def read(name: str) -> str:
    return plain((MAN / name).read_text(encoding="utf-8"))


def section(name: str, heading: str) -> str:
    parts = re.split(r"(?m)^\.SH ", read(name))
    return next(part.partition("\n")[2] for part in parts if part.partition("\n")[0] == heading)


def tags(name: str, heading: str) -> list[str]:
    return [tag.removeprefix(".B ") for tag in re.findall(r"(?m)^\.TP\n(.*)$", section(name, heading))]


def options_of(verb: str) -> list[Any]:
    command = COMMANDS[verb]
    context = command.make_context(verb, [], parent=CONTEXT, resilient_parsing=True)
    return [p for p in command.get_params(context) if p.opts[0].startswith("-")]


def run_generator(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "freres_cli.cli.manpages", *arguments]
    return subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)


def test_committed_pages_are_current() -> None:
    result = run_generator(ROOT, "--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), "run python -m freres_cli.cli.manpages"


def test_check_names_changed_missing_and_needless_pages_and_writing_mends_them(tmp_path: Path) -> None:
    for part in ("freres_cli", "presets", "man"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    man = tmp_path / "man"
    with (man / "man1/freres-ask.1").open("a", encoding="utf-8") as page:
        page.write("changed\n")
    (man / "man1/freres-demo.1").unlink()
    (man / "man1/freres-gone.1").write_text("", encoding="utf-8")
    overview = man / "man7/freres.7"
    overview.write_text(
        overview.read_text(encoding="utf-8").replace(".B qwen2\\-vl\\-7b", ".B other"), encoding="utf-8"
    )
    result = run_generator(tmp_path, "--check")
    assert result.returncode == 1
    assert result.stderr.split() == [
        *("stale:", "man/man1/freres-ask.1", "stale:", "man/man1/freres-demo.1"),
        *("stale:", "man/man1/freres-gone.1", "stale:", "man/man7/freres.7"),
    ]
    (man / "man1/freres-gone.1").unlink()
    assert run_generator(tmp_path).returncode == 0
    assert run_generator(tmp_path, "--check").returncode == 0
    assert overview.read_bytes() == (MAN / "man7/freres.7").read_bytes()


def test_unknown_argument_of_the_generator_is_usage() -> None:
    assert manpages.main(["--chekc"]) == ExitStatus.USAGE


def test_every_verb_has_a_page_and_every_page_a_verb() -> None:
    expected = {
        "man1/freres.1",
        "man3/freres.3",
        "man5/freres-bundle.5",
        "man5/freres-preset.5",
        "man5/freres-results.5",
    }
    sections = ("", "-batch", "-benchmarks", "-security", "-serving", "-speed")
    expected |= {f"man7/freres{name}.7" for name in sections}
    expected |= {f"man1/{manpages.page_name(verb)}.1" for verb in VERBS}
    assert {str(page.relative_to(MAN)) for page in PAGES} == expected
    assert set(manpages.VERBS) == set(VERBS)
    assert tags("man1/freres.1", "VERBS") == list(COMMANDS)


@pytest.mark.parametrize("verb", VERBS)
def test_page_of_a_verb_is_complete(verb: str) -> None:
    text = read(f"man1/{manpages.page_name(verb)}.1")
    headings = re.findall(r"(?m)^\.SH (.*)$", text)
    assert [h for h in headings if h != "ARGUMENTS"] == [
        *("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "OUTPUT", "EXIT STATUS", "SEE ALSO")
    ]
    help_text = " ".join(COMMANDS[verb].help.split())
    assert help_text in " ".join(
        section(f"man1/{manpages.page_name(verb)}.1", "DESCRIPTION").replace(".PP\n", "").split()
    )


@pytest.mark.parametrize("verb", VERBS)
def test_options_section_holds_every_option_with_its_facts(verb: str) -> None:
    paragraphs = section(f"man1/{manpages.page_name(verb)}.1", "OPTIONS").split(".TP\n")[1:]
    options = options_of(verb)
    assert len(paragraphs) == len(options)
    for option, paragraph in zip(options, paragraphs, strict=True):
        tag, _, text = paragraph.partition("\n")
        names = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", tag))
        assert names == {*option.opts, *option.secondary_opts}
        assert text.startswith(option.help)
        if option.is_flag:
            continue
        assert (option.metavar or "<") in tag
        if option.min is not None:
            assert f"{option.min:g}" in text
        if option.default is not None:
            assert f"Default: {option.default}." in text
        assert option.required or "Default: " in text or "again" in text, f"{tag}: what if it is not given?"


@pytest.mark.parametrize("verb", VERBS)
def test_examples_use_the_verb_and_options_that_exist(verb: str) -> None:
    known = {name for option in options_of(verb) for name in option.opts}
    lines = [
        row
        for row in section(f"man1/{manpages.page_name(verb)}.1", "EXAMPLES").splitlines()
        if row.startswith("freres ")
    ]
    assert lines
    for row in lines:
        assert row.startswith(f"freres {verb} ") or row == f"freres {verb}"
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", row)) <= known


def test_examples_of_the_overview_use_options_that_exist() -> None:
    lines = [row for row in section("man7/freres.7", "EXAMPLE").splitlines() if row.startswith("freres ")]
    assert {row.split()[1] for row in lines} >= {"compress", "ask", "profile"}
    for row in lines:
        verb = next(verb for verb in VERBS if f"{row} ".startswith(f"freres {verb} "))
        known = {name for option in options_of(verb) for name in option.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", row)) <= known


def test_a_negative_form_a_range_and_choices_reach_the_page() -> None:
    other = typer.Typer()

    @other.command()
    def paint(
        fast: Annotated[bool, typer.Option("--fast/--no-fast", help="Hurry.")] = True,
        coats: Annotated[int, typer.Option("--coats", min=1, max=3, help="Layers.")] = 2,
        colour: Annotated[Colour, typer.Option("--colour", help="What.")] = Colour.RED,
        scale: Annotated[int, typer.Option("--scale", help="Size.")] = 0,
    ) -> None:
        """Paint."""

    command: Any = typer.main.get_command(other)
    context = command.make_context("paint", [], resilient_parsing=True)
    by_name = {p.name: plain(manpages.option(p, context, {})) for p in command.get_params(context)}
    assert by_name["fast"] == ".TP\n--fast / --no-fast\nHurry. Default: on.\n"
    assert by_name["coats"] == ".TP\n--coats <int>\nLayers. 1 to 3. Default: 2.\n"
    assert by_name["colour"] == ".TP\n--colour <red|blue>\nWhat. Default: red.\n"
    assert by_name["scale"] == ".TP\n--scale <int>\nSize. Default: 0.\n"


def test_text_that_roff_would_read_as_something_else_is_escaped() -> None:
    assert manpages.line(".start -x 'a' \\n ~^") == "\\&.start \\-x \\(aqa\\(aq \\en \\(ti\\(ha\n"
    assert manpages.line("é `--x`") == "\\[u00E9] \\fB\\-\\-x\\fR\n"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_groff_has_nothing_to_say(page: Path) -> None:
    command = ["groff", "-t", "-man", "-ww", "-z", "-Tutf8", "-rLL=78n", str(page)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_pages_that_exist(page: Path) -> None:
    known = {f"{other.stem}({other.suffix[1:]})" for other in PAGES}
    text = re.sub(r"(?m)^\.BR (\S+) ", r"\1", plain(page.read_text(encoding="utf-8")))
    assert set(re.findall(r"freres(?:-[\w-]+)?\(\d\)", text)) <= known


def _is_of(schema: str, verb: str) -> bool:
    """A verb within a verb has its name in its schemas."""
    return " " not in verb or verb.replace(" ", "_") in schema


def test_every_json_schema_is_on_the_page_of_its_verb() -> None:
    printed = {
        verb: {
            schema for schema in re.findall(r'print_json(?:_line)?\("(freres\.\w+/\d+)"', text) if _is_of(schema, verb)
        }
        for path, text in SOURCES.items()
        for verb in VERBS
        if path.parent.name == "cli" and path.stem == verb.split()[0]
    }
    documented = {verb: {schema.split()[0] for schema in manpages.VERBS[verb]["schemas"]} for verb in VERBS}
    assert documented == printed


def test_preset_page_holds_every_key_and_legal_examples(tmp_path: Path) -> None:
    name = "man5/freres-preset.5"
    assert tags(name, "KEYS") == list(KEYS) == list(manpages.KEY_EXAMPLES)
    keys = section(name, "KEYS").split(".TP\n")[1:]
    for paragraph, (key, rule) in zip(keys, KEYS.items(), strict=True):
        assert rule.help[1:] in paragraph and f"Example: {key}: " in paragraph
        for limit in (rule.low, rule.high):
            assert limit is None or f"{limit:g}" in paragraph
        assert all(choice in paragraph for choice in rule.choices or ())
        check_value(key, yaml.safe_load(manpages.KEY_EXAMPLES[key]), "example")
    preset = tmp_path / "lectures.yaml"
    preset.write_text(manpages.EXAMPLE_PRESET, encoding="utf-8")
    assert Compressor(preset=str(preset)).options.settings.sample_fps == 1.0


def test_overview_names_statuses_variables_and_presets() -> None:
    assert tags("man7/freres.7", "EXIT STATUS") == [str(status.value) for status in ExitStatus]
    assert set(manpages.EXIT_MEANINGS) == {status.name for status in ExitStatus}
    code = "\n".join(SOURCES.values())
    used = set(re.findall(r"\b(?:FRERES_[A-Z]+|HF_[A-Z_]+)\b", code))
    used |= {f"FRERES_{name.upper()}" for name in re.findall(r'environment_value\("(\w+)"\)', code)}
    assert set(tags("man7/freres.7", "ENVIRONMENT")) == used
    assert tags("man7/freres.7", "PRESETS") == preset_names()


def test_bundle_page_holds_every_tensor_with_its_dtype_and_shape() -> None:
    import torch

    from freres_cli.method.budget import MethodSettings, plan_budget
    from freres_cli.method.compress import compress_latents
    from freres_cli.tracks import COLUMNS, Tracks

    settings = MethodSettings("absorber", 40, 2, 8, 0.4, 1, 2, 3, None, True)
    latents = torch.randn(12, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    tracks = compress_latents(latents, range(12), plan_budget(12, (3, 3), settings, 40), settings, 4)
    rows = re.findall(
        r"(?m)^(\w+)\t(E|float64|float32|int64|uint8) \((.*?)\)", section("man5/freres-bundle.5", "TENSORS")
    )
    rows = rows[: len(COLUMNS)]
    assert {row[0] for row in rows} == {f.name for f in fields(Tracks)} - {"width", "grid", "pooled_grid"}
    assert len(rows) == len({row[0] for row in rows})
    sizes = {"T": {12}, "C": {4}, "8": {8}, "G": {tracks.gop_anchor_frame.shape[0]}}
    for name, dtype, shape in rows:
        tensor = getattr(tracks, name)
        assert str(tensor.dtype) == f"torch.{'float32' if dtype == 'E' else dtype}", name
        letters = shape.split(", ")
        assert len(letters) == tensor.ndim, name
        assert all(size in sizes.get(letter, {size}) for letter, size in zip(letters, tensor.shape, strict=True)), name


def test_bundle_page_holds_the_tensors_of_tokens() -> None:
    from freres_cli.records import VideoTokens
    from freres_cli.tracks import TOKEN_COLUMNS

    text = section("man5/freres-bundle.5", "TENSORS").partition(".SS Content tokens")[2]
    assert ".SS" not in text, "nothing else follows"
    rows = re.findall(r"(?m)^(\w+)\t(E|float64|float32|int64|uint8) \((.*?)\)", text)
    named = [name for name, _, _ in rows]
    assert named == [name for name in TOKEN_COLUMNS if name != "frame_seconds"] and "frame_seconds" in text
    assert set(TOKEN_COLUMNS) == {f.name for f in fields(VideoTokens)} - {"width", "grid", "boxes", "stretches"}


def test_bundle_page_holds_the_tensors_of_stretches() -> None:
    import torch

    from freres_cli.method.adaptive import StretchCompressor
    from freres_cli.stretches import STRETCH_COLUMNS

    compressor = StretchCompressor((3, 3), 4, 40, keeps_trends=True)
    compressor.push(torch.randn(12, 3, 3, 4, generator=torch.Generator().manual_seed(0)), range(12))
    stretches = compressor.finish()
    text = section("man5/freres-bundle.5", "TENSORS").partition(".SS Content stretches")[2].partition(".SS ")[0]
    rows = re.findall(r"(?m)^(\w+)\t(E|float64|float32|int64|uint8) \((.*?)\)", text)
    assert [row[0] for row in rows] == [name for name in STRETCH_COLUMNS if name != "frame_seconds"]
    assert "frame_seconds" in text
    sizes = {"S": 40, "S-1": 39, "C": 4, "D": 4, "2": 2, "6": 6}
    for name, dtype, shape in rows:
        tensor, letters = getattr(stretches, name), shape.split(", ")
        assert str(tensor.dtype) == f"torch.{'float32' if dtype == 'E' else dtype}", name
        assert [sizes.get(letter, size) for letter, size in zip(letters, tensor.shape, strict=True)] == list(
            tensor.shape
        )


def test_bundle_page_holds_the_manifest_and_the_outer_keys() -> None:
    from freres_cli.bundle import version_4
    from freres_cli.bundle.schema import FORMAT, READERS, SCHEMA_VERSION, SECTIONS

    name = "man5/freres-bundle.5"
    assert set(tags(name, "MANIFEST")) == {*SECTIONS, "content"}
    told = " ".join(section(name, "MANIFEST").replace("\n", " ").split())
    fields = [field for part in version_4.FIELDS.values() for field in part]
    assert [field for field in fields if not re.search(rf"\b{field}\b", told)] == []
    later = set(KEYS) - set(version_4.SETTINGS) - {"description"}
    listed = re.search(r"this version has all but (.*?), which came later", told)
    assert listed is not None and set(re.split(r", | and ", listed[1])) == later
    assert tags(name, "FILE") == ["format", "schema_version", "manifest", "manifest_sha256", "tensors"]
    outer = section(name, "FILE")
    assert FORMAT in outer and f"integer {SCHEMA_VERSION}." in outer
    assert all(dtype in section(name, "READER") for dtype in READERS[SCHEMA_VERSION].DTYPES)


def test_the_page_of_the_api_names_what_there_is() -> None:
    import inspect

    import freres_cli
    from freres_cli.pipeline.bundle import Bundle, load_bundle
    from freres_cli.pipeline.compressor import Compressor
    from freres_cli.pipeline.query import Query
    from freres_cli.pipeline.session import Session
    from freres_cli.records import Answer

    text = read("man3/freres.3")
    assert all(name in text for name in freres_cli.__all__)
    calls = {
        "Compressor": (Compressor, Compressor.__init__),
        **{name: (Compressor, getattr(Compressor, name)) for name in ("compress", "plan")},
        **{name: (Bundle, getattr(Bundle, name)) for name in ("save", "tokens", "open", "repack")},
        **{name: (Session, getattr(Session, name)) for name in ("ask", "ask_many", "find_evidence", "forget_prefix")},
        "load_bundle": (None, load_bundle),
    }
    for name, (_, function) in calls.items():
        signature = re.search(rf"(?m)^\.B {name}\((.*)\)$", text)
        assert signature is not None, name
        told = [part.strip().lstrip("*") for part in signature[1].split(",")]
        real = [p for p in inspect.signature(function).parameters if p != "self"]
        assert [part for part in told if part] == real, name
    for kind in (Answer, Query):
        assert all(field.name in text for field in fields(kind))
    public = {name for name in vars(Session) if not name.startswith("_")} | {f.name for f in fields(Bundle)}
    assert all(name in text for name in public if name not in ("name", "_prefixes"))


def test_the_version_of_the_api_page_is_that_of_the_package() -> None:
    from freres_cli import __version__

    assert f'"freres {__version__}"' in (MAN / "man3/freres.3").read_text(encoding="utf-8")
