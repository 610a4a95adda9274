"""bundle -> smaller bundle: no video, no tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.files import check_destination
from freres_cli.pipeline.cutting import Cut, cut_content


@dataclass(frozen=True)
class RepackResult:
    """A smaller bundle. ``notes``: what the user should know."""

    bundle: Path
    bundle_bytes: int
    manifest: dict[str, Any]
    notes: tuple[str, ...]


def repack_bundle(source: Path, output: Path, cut: Cut, *, force: bool = False) -> RepackResult:
    """Cut a bundle to a smaller budget.

    ``source``, ``output``: the bundle, and the one to write. ``cut``: what to cut it to. ``force``: replace an existing
    file. Raises ``BundleError`` for a bad bundle or one whose method cannot be cut so, ``UsageError`` for an illegal cut or
    a file that cannot be written.
    """
    check_destination(output, force)
    bundle = read_bundle(source)
    content, manifest, notes = cut_content(bundle.content, bundle.manifest, cut, str(source))
    num_bytes = write_bundle(output, content, manifest, force=force)
    return RepackResult(output, num_bytes, manifest, notes)
