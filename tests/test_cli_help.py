"""Help, version, completion and usage errors: narrow, and without loading anything heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from freres_cli import __version__
from freres_cli.baselines.registry import BUNDLE_METHODS
from freres_cli.cli.app import app
from freres_cli.cli.catalog import CHECKPOINT_IDS
from freres_cli.cli.manpages import leaf_commands
from freres_cli.presets import preset_names

ROOT = Path(__file__).parents[1]
GROUP: Any = typer.main.get_command(app)
VERBS = list(GROUP.commands)
LEAVES = [verb for verb in leaf_commands(GROUP) if " " in verb]
HEAVY = {"torch", "transformers", "av", "numpy", "safetensors", "tokenizers", "huggingface_hub"}
# Runs the command once for each line that it reads, in a process that has made the command and run nothing yet. The
# answer is the exit status; both streams and the names of all loaded modules are in files.
SERVER = """
import json, os, pathlib, sys
import typer
from freres_cli.cli.app import app, main
typer.main.get_command(app)
for line in sys.stdin:
    arguments, variables, folder = json.loads(line)
    if (child := os.fork()) == 0:
        os.chdir(folder)
        os.environ.update(variables)
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        sys.argv = ["freres", *arguments]
        try:
            main()
        finally:
            pathlib.Path("modules").write_text("\\n".join(sys.modules))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Run:
    status: int
    stdout: str
    stderr: str
    heavy: set[str]


@pytest.fixture(scope="module")
def freres(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the command in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FRERES_", "_FRERES", "COLUMNS"))}
    variables = {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SERVER], env=variables, stdin=pipe, stdout=pipe, text=True) as server:

        def run(*arguments: str, **environment: str) -> Run:
            print(json.dumps([arguments, environment, str(folder)]), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            out, err, modules = ((folder / name).read_text() for name in ("out", "err", "modules"))
            return Run(status, out, err, {name.partition(".")[0] for name in modules.splitlines()} & HEAVY)

        yield run
        server.stdin.close()


@pytest.mark.parametrize("verb", ["", *VERBS, *LEAVES])
def test_help_is_narrow_and_light(freres: Any, verb: str) -> None:
    result = freres(*verb.split(), "--help")
    assert (result.status, result.stderr, result.heavy) == (0, "", set())
    assert result.stdout.startswith(f"Usage: freres {verb}".rstrip())
    assert max(map(len, result.stdout.splitlines())) <= 80
    command = {"": GROUP, **GROUP.commands, **leaf_commands(GROUP)}[verb]
    assert all(option in result.stdout for p in command.params for option in p.opts if option.startswith("-"))


@pytest.mark.parametrize("verb", ["", "ask"])
def test_short_help_is_help(freres: Any, verb: str) -> None:
    assert freres(*verb.split(), "-h").stdout == freres(*verb.split(), "--help").stdout


def test_help_lists_every_verb(freres: Any) -> None:
    listed = freres("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == VERBS


def test_every_verb_and_every_option_has_a_help_text() -> None:
    for verb, command in leaf_commands(GROUP).items():
        assert command.help, verb
        assert [p.name for p in command.params if not p.help] == [], verb


def test_no_arguments_show_help(freres: Any) -> None:
    result = freres()
    assert "Usage: freres" in result.stdout + result.stderr
    assert result.status == 2 and result.heavy == set()


def test_version(freres: Any) -> None:
    result = freres("--version")
    assert (result.status, result.stdout, result.stderr) == (0, f"freres {__version__}\n", "")
    assert result.heavy == set()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("comprss", "video.mp4"), "comprss"),
        (("--budgt",), "--budgt"),
        (("compress", "video.mp4", "--budgt", "3"), "--budgt"),
        (("compress",), "VIDEO"),
        (("compress", "video.mp4", "--budget", "many"), "--budget"),
        (("compress", "video.mp4", "--budget", "0"), "--budget"),
        (("compress", "video.mp4", "--set", "budget_tokens"), "KEY=VALUE"),
        (("compress", "video.mp4", "--method", "other"), "--method"),
        (("compress", "video.mp4", "--revision", "main"), "--revision"),
        (("ask", "bundle.pt", "what?", "--model", ".", "--revision", "main"), "--revision"),
        (("compress", "video.mp4", "--preset", "qwen2-vl-7"), "qwen2-vl-7b"),
        (("compress", "video.mp4", "--fps", "1", "--frames", "2"), "--frames"),
        (("repack", "bundle.pt", "--output", "small.pt"), "--budget"),
        (("ask", "bundle.pt", "--json"), "--json"),
        (("presets", "no-such"), "no-such"),
        (("models", "extra"), "extra"),
    ],
)
def test_usage_errors_exit_2_and_name_the_word(freres: Any, arguments: tuple[str, ...], names: str) -> None:
    result = freres(*arguments)
    assert (result.status, result.stdout, result.heavy) == (2, "", set())
    assert names in result.stderr
    assert "Traceback" not in result.stderr


def complete(freres: Any, line: str) -> list[str]:
    """What TAB offers in bash after ``line``."""
    words = line.split(" ")
    result = freres(_FRERES_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert (result.status, result.stderr, result.heavy) == (0, "", set())
    return sorted(result.stdout.split())


def test_completion_of_verbs(freres: Any) -> None:
    assert complete(freres, "freres ") == sorted(VERBS)
    assert complete(freres, "freres pr") == ["presets", "profile"]


@pytest.mark.parametrize("line", ["freres compress video.mp4 --preset ", "freres profile --preset ", "freres presets "])
def test_completion_of_presets(freres: Any, line: str) -> None:
    assert complete(freres, line) == preset_names()
    assert complete(freres, line + "qwen2") == ["qwen2-vl-7b"]


def test_completion_of_methods(freres: Any) -> None:
    assert complete(freres, "freres compress video.mp4 --method ") == sorted(BUNDLE_METHODS)
    assert complete(freres, "freres eval q.jsonl --methods uniform,fu") == ["uniform,full"]


@pytest.mark.parametrize("verb", ["compress video.mp4", "ask bundle.pt", "demo"])
def test_completion_of_models(freres: Any, verb: str) -> None:
    assert complete(freres, f"freres {verb} --model ") == sorted(["bundled", *CHECKPOINT_IDS])
    assert complete(freres, f"freres {verb} --model b") == ["bundled"]


def test_completion_of_options(freres: Any) -> None:
    assert complete(freres, "freres compress --dr") == ["--dry-run"]


def test_catalog_is_the_registry() -> None:
    from freres_cli.backbones.registry import KNOWN_CHECKPOINTS

    assert tuple(checkpoint.model_id for checkpoint in KNOWN_CHECKPOINTS) == CHECKPOINT_IDS


@pytest.mark.parametrize("arguments", [("presets",), ("presets", "qwen2-vl-7b"), ("presets", "--json")])
def test_presets_load_nothing_heavy(freres: Any, arguments: tuple[str, ...]) -> None:
    result = freres(*arguments)
    assert (result.status, result.stderr, result.heavy) == (0, "", set())
