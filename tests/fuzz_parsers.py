"""Coverage-guided fuzzing of the code here that parses bytes: ``python -m tests.fuzz_parsers PARSER FOLDER [FLAG ...]``.

Parsers: ``bundle`` (a whole file), ``pickle`` (that of a bundle) and ``ending`` (of a video). FOLDER keeps the inputs that
reach new code; flags are libFuzzer's, such as ``-max_total_time=60 -timeout=20 -rss_limit_mb=2048``. Needs the package
atheris, which is not among freres' own requirements. Any exception but a named error stops the run.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import atheris
import torch

# Before anything else imports them.
with atheris.instrument_imports(include=["freres_cli.bundle", "freres_cli.video.ending", "pickletools", "zipfile"]):
    from freres_cli.bundle.store import read_bundle, write_bundle
    from freres_cli.video.ending import ends_inside, is_whole_avi

from freres_cli.errors import FreresError
from tests import forged_bundles

CONTAINERS = ("mpegts", "asf", "ogg", "gif", "mov,mp4,m4a,3gp,3g2,mj2")


def write_archive(path: Path, pickle: bytes) -> None:
    """Write an archive as torch writes it, with this pickle and a few tensors."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickle, len(pickle))
    for number in range(3):
        writer.write_record(f"data/{number}", bytes(64), 64)
    writer.write_end_of_file()


def main() -> None:
    """Fuzz one parser until the time is up or something fails."""
    parser, corpus = sys.argv[1], Path(sys.argv[2])
    folder = Path(tempfile.mkdtemp())
    path = folder / "case.pt"
    corpus.mkdir(parents=True, exist_ok=True)
    if parser != "ending":
        tracks = forged_bundles.make_tracks(forged_bundles.smooth_latents())
        write_bundle(path, tracks, forged_bundles.manifest_for(tracks))
        with zipfile.ZipFile(path) as archive:
            pickle = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        (corpus / "whole").write_bytes(path.read_bytes() if parser == "bundle" else pickle)

    def try_one(data: bytes) -> None:
        if parser == "pickle":
            write_archive(path, data)
        else:
            path.write_bytes(data)
        if parser == "ending":
            is_whole_avi(str(path), len(data))
            for container in CONTAINERS:
                ends_inside(str(path), container, len(data))
            return
        try:
            read_bundle(path)
        except FreresError as error:
            assert "\n" not in error.message

    atheris.Setup([sys.argv[0], *sys.argv[2:]], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
