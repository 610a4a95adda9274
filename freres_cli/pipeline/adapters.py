"""Trained modules: which adapter to use, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freres_cli.baselines.registry import ADAPTIVE, FRE_RES
from freres_cli.bundle.adapter import read_adapter, read_header
from freres_cli.errors import BackboneError, UsageError
from freres_cli.evaluation.cells import Cell
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.method.stretch_modules import NUM_ORDERS, StretchModules
from freres_cli.pipeline.models import Models, describe_model
from freres_cli.presets import BUNDLED
from freres_cli.world.bundled_model import bundled_adapter, bundled_model_info, name_weights

NO_ADAPTER = "none"
TRAINED_ON = "videos"  # where the facts about a training have what ``name_videos`` returns
DIGEST_START = 16  # hexadecimal digits
TRAINED_METHODS = (FRE_RES, ADAPTIVE)
AnyModules = FreResModules | StretchModules


@dataclass(frozen=True)
class Adapter:
    """Trained modules for ``method``. ``training``: what their file records about how they were trained, if anything."""

    path: Path
    method: str
    modules: AnyModules
    training: Mapping[str, Any]


def choose_adapter(named: str | None, model_id: str | None, method: str, variant: str) -> Path | None:
    """Return the adapter file to use: ``named``, or ``None`` if that is ``none``.

    By default it is the one that ships with the bundled model, if ``model_id`` is that, and ``method`` and ``variant`` are
    those it was trained for.
    """
    if named is not None:
        return None if named == NO_ADAPTER else Path(named)
    path = bundled_adapter()
    is_fit = model_id == BUNDLED and method == FRE_RES and variant == "absorber"
    return path if is_fit and path.exists() else None


def adapter_file(named: str | None) -> Path | None:
    """Return the file that ``named`` names; ``None`` if it names none."""
    return None if named in (None, NO_ADAPTER) else Path(str(named))


def choose_adapter_for(named: str | None, model: Mapping[str, Any], method: str, variant: str) -> Path | None:
    """Return the adapter file to use for a bundle, as ``choose_adapter`` does.

    ``named``, ``method``, ``variant``: as there. ``model``: the manifest's facts about its backbone. The adapter that
    ships fits only the weights that are embedded today.
    """
    return choose_adapter(named, None if has_other_weights(model) else model["model_id"], method, variant)


def give_adapters(cells: Sequence[Cell], named: str | None, model_id: str, variant: str) -> tuple[Cell, ...]:
    """Return the cells, each with the adapter that it uses.

    ``cells``: methods and budgets. ``named``: an adapter, which those of its own method use, or ``none``; the others, or
    all without one, use what ``choose_adapter`` chooses. ``model_id``, ``variant``: as there. Raises ``BackboneError`` for
    an adapter of a method that is in no cell, ``UsageError`` if no cell takes one.
    """
    refuse_unused_adapter(named, [cell.method for cell in cells])
    able = [cell.method for cell in cells if cell.method in TRAINED_METHODS]
    own = None if named in (None, NO_ADAPTER) else _method_of(read_header(Path(str(named))))
    if own is not None and own not in able:
        raise _for_another_method(Path(str(named)), " or ".join(dict.fromkeys(able)), own)
    given = []
    for cell in cells:
        mine = named if own in (None, cell.method) else None
        path = choose_adapter(mine, model_id, cell.method, variant) if cell.method in able else None
        given.append(replace(cell, adapter=path))
    return tuple(given)


def refuse_unused_adapter(named: str | None, methods: Sequence[str], name: str = "--adapter") -> None:
    """Raise ``UsageError`` if an adapter is ``named`` that none of the ``methods`` can take. ``name``: of the flag or key."""
    if named in (None, NO_ADAPTER) or set(methods) & set(TRAINED_METHODS):
        return
    known = ", ".join(dict.fromkeys(methods))
    raise UsageError(
        f"{name}: has no effect on {known}", f"leave it out, or name {' or '.join(TRAINED_METHODS)} as well"
    )


def name_videos(sha256s: Iterable[str]) -> list[str]:
    """Return what the header of an adapter has of the videos that it was trained on: how their digests begin, sorted."""
    return sorted(sha256[:DIGEST_START] for sha256 in sha256s)


def read_training_videos(cells: Iterable[Cell]) -> dict[Path, frozenset[str]]:
    """Return what the adapter of each cell was trained on, as ``name_videos`` has it; nothing where it was not recorded.
    Raises ``BackboneError``."""
    found = {}
    for path in dict.fromkeys(cell.adapter for cell in cells if cell.adapter is not None):
        videos = (read_header(path).get("training") or {}).get(TRAINED_ON)
        found[path] = frozenset(map(str, videos if isinstance(videos, list) else ()))
    return found


def describe_overlap(trained: Mapping[Path, frozenset[str]], sha256s: Sequence[str]) -> Iterator[str]:
    """Yield a note on each adapter that was trained on videos it is now measured on. ``trained``: from
    ``read_training_videos``. ``sha256s``: of what is measured."""
    for path, videos in trained.items():
        seen = sum(name in videos for name in name_videos(sha256s))
        if seen:
            counted = "this video" if len(sha256s) == 1 else f"{seen} of these {len(sha256s)} videos"
            yield f"adapter {path.name} was trained on {counted}: its rows do not show how it does on others"


def has_other_weights(model: Mapping[str, Any]) -> bool:
    """Whether the ``model`` of a manifest has embedded weights other than today's. The decoder that reads its tokens, of
    which ``model`` may have the digest as well, is compared with the one that the adapter that ships was trained for."""
    if model["model_id"] != BUNDLED:
        return False
    if name_weights(model["projector_sha256"]) != bundled_model_info()["weights"]:
        return True
    shipped, decoder = bundled_adapter(), model.get("decoder_sha256")
    if decoder is None or not shipped.exists():
        return False
    return bool(decoder != read_header(shipped)["model"].get("decoder_sha256"))


def load_adapter(path: Path, model: Mapping[str, Any]) -> Adapter:
    """Read an adapter for the backbone that ``model`` describes. Raises ``BackboneError``."""
    weights, header = read_adapter(path, model, describe_model)
    method = _method_of(header)
    if method not in TRAINED_METHODS:
        raise _for_another_method(path, " or ".join(TRAINED_METHODS), method)
    try:
        shape = ModuleShape.from_dict(header["shape"])
        # Without values: a header may ask for any size, and only that of the weights in the file is taken.
        with torch.device("meta"):
            modules: AnyModules = StretchModules(shape) if method == ADAPTIVE else FreResModules(shape)
        _check_shapes(modules, weights)
        modules.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(f"{path}: damaged adapter: {str(error).splitlines()[0]}") from error
    return Adapter(path, method, modules.eval().requires_grad_(False), header.get("training") or {})


def _check_shapes(modules: AnyModules, weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless the weights have the names and shapes of ``modules``."""
    wanted, given = ({name: tuple(x.shape) for name, x in own.items()} for own in (modules.state_dict(), weights))
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(f"{name}: expected shape {wanted.get(name, 'none')}, got {given.get(name, 'none')}")


def _method_of(header: Mapping[str, Any]) -> str:
    """The method that an adapter was trained for. Earlier releases trained one only, and did not say so."""
    return str(header.get("method", FRE_RES))


def load_modules(path: Path, model: Mapping[str, Any], variant: str, width: int, num_bands: int) -> FreResModules:
    """Return modules of method fre-res that fit what they are used for.

    ``path``: the adapter. ``model``: facts about the backbone, from a manifest or the loaded one. ``variant``: that of
    the tracks. ``width``, ``num_bands``: D, and how many bands the tracks have, or may have. Raises ``BackboneError`` for
    an adapter that does not fit.
    """
    adapter = load_adapter(path, model)
    if not isinstance(adapter.modules, FreResModules):
        raise _for_another_method(path, FRE_RES, adapter.method)
    check_variant(adapter, variant)
    check_shape(adapter, width, num_bands)
    return adapter.modules


def load_stretch_modules(path: Path, model: Mapping[str, Any], width: int) -> StretchModules:
    """Return modules of method adaptive. ``path``, ``model``, ``width``: as for ``load_modules``. Raises
    ``BackboneError``."""
    adapter = load_adapter(path, model)
    if not isinstance(adapter.modules, StretchModules):
        raise _for_another_method(path, ADAPTIVE, adapter.method)
    check_shape(adapter, width, NUM_ORDERS)
    return adapter.modules


def load_modules_for(path: Path, method: str, models: Models, settings: Mapping[str, Any]) -> AnyModules:
    """Return modules that fit the model, on the device of its language half.

    ``path``: the adapter. ``method``: what it must be for. ``models``: both halves, of which the weights are compared as
    well. ``settings``: those that the clips are compressed with. Raises ``BackboneError``, also if it has fewer bands than
    the settings allow coefficients: how many a clip has is known only after it is compressed.
    """
    model = models.language_model
    modules: AnyModules
    if method == ADAPTIVE:
        modules = load_stretch_modules(path, models.facts, model.width)
    else:
        modules = load_modules(path, models.facts, settings["variant"], model.width, settings["max_coefficients"])
    return modules.to(model.device)


def check_shape(adapter: Adapter, width: int, num_bands: int) -> None:
    """Refuse modules of a width other than ``width`` (D), or with fewer bands. Raises ``BackboneError``."""
    shape = adapter.modules.shape
    if shape.width != width:
        raise BackboneError(f"{adapter.path}: adapter width: expected {width}, got {shape.width}")
    if shape.num_bands < num_bands:
        raise BackboneError(
            f"{adapter.path}: adapter bands: expected at least {num_bands}, got {shape.num_bands}",
            f"set max_coefficients={shape.num_bands} when compressing, or name --adapter none",
        )


def check_variant(adapter: Adapter, variant: str) -> None:
    """Refuse modules that were trained for another variant. Raises ``BackboneError``."""
    trained = adapter.training.get("variant", variant)
    if trained != variant:
        raise BackboneError(
            f"{adapter.path}: adapter for another variant: expected {variant}, got {trained}",
            "compress with --variant, or train an adapter with --set variant=",
        )


def _for_another_method(path: Path, expected: str, got: str) -> BackboneError:
    return BackboneError(
        f"{path}: adapter for another method: expected {expected}, got {got}",
        f"compress with --method {got}, or train an adapter with --set method={expected.partition(' ')[0]}",
    )
