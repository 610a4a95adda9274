"""Presets and settings: flag > environment > preset > default, and every value remembers where it came from."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from freres_cli.errors import PresetError, explain_no_file

# The model that ships with freres, and its preset.
BUNDLED = "bundled"
MODEL_INFO_FILE = "MODEL_INFO.json"  # facts about models of its kind; released checkpoints do not have it
VARIANTS = ("absorber", "anchors", "temporal", "concat", "idct", "iquery", "sparse-idct")
SAMPLES = ("native", "fps", "count")
TEXT_AFTER = ("max", "hf")
DEEPSTACK = ("keep", "drop")
RESIDUAL_GRIDS = FULL, HALF = "full", "half"
TRENDS = ("drop", "keep")


@dataclass(frozen=True)
class Key:
    """One preset key: type, legal range or values, default and meaning. The help and the man page are made from this."""

    kind: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    optional: bool = False


KEYS: dict[str, Key] = {
    "description": Key(str, "", "one line that 'freres presets' shows"),
    "method": Key(str, "adaptive", "compression method, see freres methods"),
    "budget_tokens": Key(int, 1280, "maximum visual tokens given to the language model", low=1),
    "quality": Key(
        float,
        None,
        "share of the latents' energy to keep, in as few tokens as possible",
        low=0.0,
        high=1.0,
        optional=True,
    ),
    "sample": Key(str, "native", "which frames are read", choices=SAMPLES),
    "sample_fps": Key(float, None, "frames read per second, with sample: fps", low=1e-6, high=1000.0, optional=True),
    "sample_count": Key(int, None, "frames read from the clip, with sample: count", low=1, optional=True),
    "still_levels": Key(
        int,
        0,
        "a frame counts as the last one encoded if no sample differs by more levels of 255; 0: only if equal",
        low=0,
        high=64,
    ),
    "line_levels": Key(
        int,
        0,
        "skip a frame if every colour in it is within this many levels (of 255) of a straight line between two encoded "
        "frames; 0 encodes every frame; adaptive only",
        low=0,
        high=64,
    ),
    "track_density": Key(
        int,
        1,
        "adaptive and fre-res read this many times as many frames as sample names, unless every token is kept",
        low=1,
        high=64,
    ),
    "grid": Key(
        str,
        "auto",
        "token grid of a frame, ROWSxCOLUMNS, or auto to keep the aspect ratio, within the model's limits for a picture",
    ),
    "residual_grid": Key(
        str,
        "full",
        "token grid of the frames between anchors: full, half of each side, or ROWSxCOLUMNS; only fre-res",
    ),
    "tokens_per_frame": Key(int, 576, "maximum tokens per frame, with grid: auto", low=1),
    "variant": Key(str, "absorber", "how residuals become tokens (ablation)", choices=VARIANTS),
    "anchors": Key(int, 8, "evenly spaced anchor frames at the preset's own budget", low=1),
    "keep_per_block": Key(int, 8, "anchor tokens kept out of the 9 in a 3x3 block", low=1, high=9),
    "temporal_share": Key(float, 0.2, "minimum share of the budget for residual tokens", low=0.0, high=0.95),
    "static_per_gop": Key(int, 3, "static background tokens per GoP", low=0, high=64),
    "pooled_side": Key(int, 4, "cells per side after residuals are pooled", low=1, high=64),
    "max_coefficients": Key(int, 4, "maximum DCT coefficients per cell", low=1, high=64),
    "events": Key(bool, True, "add anchor frames where something new starts"),
    "tau": Key(float, None, "event threshold; auto adapts it to the clip", low=0.0, high=2.0, optional=True),
    "text_after": Key(str, "max", "position of the text after the video", choices=TEXT_AFTER),
    "deepstack": Key(str, "keep", "whether DeepStack families keep the extra rows of each token", choices=DEEPSTACK),
    "trends": Key(
        str,
        "drop",
        "whether adaptive also stores how each stretch changes, which its adapters need: the bundle is up to twice as large",
        choices=TRENDS,
    ),
}


# Far more than a preset needs: it is a few dozen lines, each a key and a value.
MAX_YAML_CHARACTERS, MAX_YAML_EVENTS, MAX_YAML_DEPTH = 65_536, 1000, 8
MAX_WHOLE = 2**63 - 1
MAX_SHOWN = 80  # characters of a bad value in a message

# Not a preset key: the preset's own budget, for which ``anchors`` was chosen.
REFERENCE = "reference_budget_tokens"


@dataclass(frozen=True)
class Settings:
    """The value of every key in ``KEYS`` except the description, and where each came from.

    ``reference_budget_tokens``: the preset's own budget, for which ``anchors`` was chosen. ``sources``: for each key,
    ``flag``, ``preset NAME``, ``default``, or the verb that set it. ``file``: that of the preset. ``names``: what those that
    were named are called in messages, if not by their keys.
    """

    method: str
    budget_tokens: int
    quality: float | None
    sample: str
    sample_fps: float | None
    sample_count: int | None
    still_levels: int
    line_levels: int
    track_density: int
    grid: str
    residual_grid: str
    tokens_per_frame: int
    variant: str
    anchors: int
    keep_per_block: int
    temporal_share: float
    static_per_gop: int
    pooled_side: int
    max_coefficients: int
    events: bool
    tau: float | None
    text_after: str
    deepstack: str
    trends: str
    reference_budget_tokens: int
    sources: Mapping[str, str]
    file: Path
    names: Mapping[str, str] = field(default_factory=dict, compare=False)

    def values(self) -> dict[str, Any]:
        """Return the value of each key."""
        found = asdict(self)
        del found["sources"], found["file"], found["names"]
        return found

    def is_named(self, key: str) -> bool:
        """Return whether a value was given, and is no preset's."""
        return not self.sources[key].startswith(("preset", "default"))

    def name_of(self, key: str) -> str:
        """Return the name of a setting in messages: what the user wrote, or the key, with the preset that it came from."""
        return self.names.get(key, key) if self.is_named(key) else f"{self.sources[key]}: {key}"

    def with_values(self, source: str, **values: Any) -> Settings:
        """Return these settings with some values changed. ``source``: where the new values come from."""
        names = {key: name for key, name in self.names.items() if key not in values}
        return replace(self, **values, sources={**self.sources, **dict.fromkeys(values, source)}, names=names)

    def record(self) -> dict[str, dict[str, Any]]:
        """Return the value and source of each key, in the form that bundles and ``--json`` documents use."""
        return {key: {"value": value, "source": self.sources[key]} for key, value in self.values().items()}


@dataclass(frozen=True)
class Preset:
    """A validated preset: its name, the file it came from, and its values."""

    name: str
    path: Path
    values: Mapping[str, Any]


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice. Plain YAML silently lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, where: str) -> Any:
    """Return what YAML says, unless it says more than settings need: a few bytes of aliases make gigabytes of values, and
    deep nesting exhausts the stack. Raises ``PresetError``, which names ``where``."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise PresetError(f"{where}: expected at most {MAX_YAML_CHARACTERS} characters, got more")
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise PresetError(f"{where}: expected plain values, got the alias {_shown(f'*{event.anchor}')}")
            if depth > MAX_YAML_DEPTH or number > MAX_YAML_EVENTS:
                raise PresetError(f"{where}: expected one value for each setting, got far more")
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    # The last two come of a tag that does not fit its value.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise PresetError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def presets_dir() -> Path:
    """Return the folder of the shipped presets: inside the package once installed, else beside it."""
    installed = Path(__file__).parent / "presets_data"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "presets"


def preset_names() -> list[str]:
    """Return the names of the shipped presets, sorted."""
    return sorted(path.stem for path in presets_dir().glob("*.yaml"))


def load_preset(name_or_path: str) -> Preset:
    """Return a shipped preset by name, or one from a YAML file. Raises ``PresetError``."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = presets_dir() / f"{name_or_path}.yaml"
        if name_or_path not in preset_names():
            raise PresetError(
                f"preset {name_or_path}: not found",
                _near(name_or_path, preset_names())
                or f"shipped presets: {', '.join(preset_names())}; or name a .yaml file",
            )
    if not os.path.isfile(path):  # noqa: PTH113 (a name too long for the system is not a file either)
        raise PresetError(f"preset {explain_no_file(name_or_path)}", f"shipped presets: {', '.join(preset_names())}")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML_CHARACTERS + 1)
    except OSError as error:
        raise PresetError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PresetError(f"{path}: not UTF-8 text") from error
    data = _read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise PresetError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    values = {str(key): check_value(str(key), value, str(path)) for key, value in data.items()}
    return Preset(path.stem, path, values)


def check_value(key: str, value: Any, where: str, name: str | None = None) -> Any:
    """Return ``value`` converted to the type of ``key``. ``where``: what it was read from. ``name``: of the key in messages,
    if not those two. Raises ``PresetError``."""
    if key not in KEYS:
        raise PresetError(
            f"{where}: unknown setting {_shown(key)}", _near(key[:40], list(KEYS)) or f"settings: {', '.join(KEYS)}"
        )
    return check_rule(key, KEYS[key], value, name or f"{where}: {key}")


def check_rule(key: str, rule: Key, value: Any, name: str) -> Any:
    """Return ``value`` converted to the type that ``rule`` gives ``key``. ``name``: of the key in messages. Raises
    ``PresetError``."""
    if rule.optional and (value is None or value == "auto"):
        return None
    if isinstance(value, Real) and not isinstance(value, bool):  # also one of NumPy
        value = int(value) if isinstance(value, Integral) else float(value)
    fits = isinstance(value, (int, float)) if rule.kind is float else isinstance(value, rule.kind)
    if not fits or (isinstance(value, bool) and rule.kind is not bool):
        raise PresetError(f"{name}: expected {_type_name(rule)}, got {_shown(value)}")
    if rule.choices is not None and value not in rule.choices:
        raise PresetError(f"{name}: expected one of {', '.join(rule.choices)}, got {_shown(value)}")
    if rule.kind is int and abs(value) > MAX_WHOLE:
        raise PresetError(f"{name}: expected at most {MAX_WHOLE}, got a larger number")
    if (rule.low is not None and not value >= rule.low) or (rule.high is not None and not value <= rule.high):
        limits = f"at least {rule.low:g}" if rule.high is None else f"{rule.low:g} to {rule.high:g}"
        raise PresetError(f"{name}: expected {limits}, got {_shown(value)}")
    if key == "grid":
        parse_grid(value, name)
    if key == "residual_grid":
        parse_grid(value, name, RESIDUAL_GRIDS)
    return float(value) if rule.kind is float else value


def parse_grid(text: str, name: str = "grid", words: tuple[str, ...] = ("auto",)) -> tuple[int, int] | None:
    """Return (rows, columns) of ``"24x24"``, ``None`` for one of the ``words`` that may stand in its place. ``name``: of the
    setting in messages. Raises ``PresetError``."""
    if text in words:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) <= 3 and 1 <= int(part) <= 256 for part in parts):
        raise PresetError(
            f"{name}: expected ROWSxCOLUMNS such as 24x24 (1 to 256 each), or {' or '.join(words)}, got {_shown(text)}"
        )
    return int(parts[0]), int(parts[1])


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return key and checked value of ``--set KEY=VALUE``. Raises ``PresetError``."""
    key, separator, value = text.partition("=")
    if not separator:
        raise PresetError(f"--set {text}: expected KEY=VALUE")
    parsed = _read_yaml(value, f"--set {text[:MAX_SHOWN]}")
    kind = KEYS.get(key.strip(), KEYS["description"]).kind
    if kind is str and not isinstance(parsed, str):
        parsed = value
    if kind in (int, float) and not isinstance(parsed, bool | None):
        parsed = value.strip()
        with suppress(ValueError):  # as flags have numbers: YAML takes 1e-3 for text, 0100 for 64 and 1:30 for 90
            parsed = kind(value)
    return key.strip(), check_value(key.strip(), parsed, "--set")


SAMPLE_OF = {"sample_fps": "fps", "sample_count": "count"}  # the sampling that each number is for


def merge_settings(
    preset: Preset, given: Mapping[str, Any], source: str = "flag", names: Mapping[str, str] | None = None
) -> Settings:
    """Return every setting. A given value overrides ``preset``, and the preset overrides the default.

    ``given``: only the values that were named; ``None`` means ``auto`` if the key allows it. ``source``: where they came
    from. ``names``: what they are called in messages, if not by their keys. Naming a rate or a count also selects the
    matching ``sample``. Raises ``PresetError`` if values contradict.
    """
    known = {**{key: key for key in given}, **(names or {})}
    given = {key: check_value(key, value, source, known[key]) for key, value in given.items()}
    if "sample" not in given and ("sample_fps" in given or "sample_count" in given):
        if "sample_fps" in given and "sample_count" in given:
            both = f"{known['sample_fps']} and {known['sample_count']}"
            raise PresetError(f"{both}: expected one of them, got both", "leave one of them out")
        given["sample"] = "fps" if "sample_fps" in given else "count"
    for key, sample in SAMPLE_OF.items():
        if given.get(key) is None:
            continue
        if given["sample"] != sample:
            both = f"{known[key]} and {known['sample']}"
            raise PresetError(f"{both}: expected sample {sample}, got {given['sample']}", "leave one of them out")
        # A density belongs to the preset's own sampling, not to one that replaces it.
        if sample != preset.values.get("sample", KEYS["sample"].default):
            given.setdefault("track_density", 1)
    if "tokens_per_frame" in given and "grid" not in given:
        given["grid"] = "auto"
    values, sources = {}, {}
    for key, rule in KEYS.items():
        if key in given:
            values[key], sources[key] = given[key], source
        elif key in preset.values:
            values[key], sources[key] = preset.values[key], f"preset {preset.name}"
        else:
            values[key], sources[key] = rule.default, "default"
    for found in (values, sources):
        found.pop("description")
    values[REFERENCE] = preset.values.get("budget_tokens", KEYS["budget_tokens"].default)
    sources[REFERENCE] = f"preset {preset.name}"
    needed = {"fps": "sample_fps", "count": "sample_count"}.get(values["sample"])
    if needed and values[needed] is None:
        if "sample" in given:
            raise PresetError(f"sample: {values['sample']} needs {needed}", f"name it as well: {needed}=NUMBER")
        raise PresetError(f"{preset.path}: sample: {values['sample']} needs {needed}")
    return Settings(**values, sources=sources, file=preset.path, names=known)


def load_settings(
    name: str, given: Mapping[str, Any], source: str = "flag", names: Mapping[str, str] | None = None
) -> Settings:
    """Return the settings of the preset ``name``, or of a file, overridden as ``merge_settings`` does with ``given``,
    ``source`` and ``names``. Raises ``PresetError``."""
    return merge_settings(load_preset(name), given, source, names)


def environment_value(name: str) -> str | None:
    """Return a fact about the machine from ``FRERES_<NAME>``; ``None`` if it is unset or empty."""
    return os.environ.get(f"FRERES_{name.upper()}") or None


def _shown(value: Any) -> str:
    """Return a bad value for a message."""
    # Python writes no decimal number of thousands of digits.
    text = hex(value) if type(value) is int and abs(value) >= 10**18 else repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _near(word: str, words: list[str]) -> str | None:
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def _type_name(rule: Key) -> str:
    return {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}[rule.kind]
