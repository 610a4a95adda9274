"""Bundles made to exhaust time or memory are refused by their sizes and instructions, before torch reads them."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from dataclasses import replace

import pytest
import torch

from freres_cli.bundle import store
from freres_cli.bundle.archive import MAX_INSTRUCTIONS, MAX_PICKLE_BYTES
from freres_cli.bundle.schema import describe_tensors, encode_manifest
from freres_cli.bundle.store import read_bundle, write_bundle
from freres_cli.errors import BundleError, ExitStatus
from tests.forged_bundles import bundle as bundle
from tests.forged_bundles import make_stretches, manifest_for, smooth_latents
from tests.forged_bundles import tracks as tracks
from tests.runner import check_failure, fails, run_freres

MIB = 2**20


def replace_pickle(path, data: bytes) -> None:
    """Write the bundle again with another pickle, as torch writes archives."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in {**members, "data.pkl": data}.items():
        if name not in ("version", ".data/serialization_id", "byteorder"):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    path.write_bytes(buffer.getvalue())


def deflate_pickle(path, num_mib: int) -> None:
    """Write the bundle again, compressed, with a pickle of many zero bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            with archive.open(name, "w", force_zip64=True) as file:
                for part in [bytes(MIB)] * num_mib if name.endswith("data.pkl") else [content]:
                    file.write(part)


def add_zip64_end(path) -> None:
    """End an archive that ``zipfile`` wrote with the records that torch writes."""
    data = path.read_bytes()
    count, size, start = struct.unpack("<10xHII2x", data[-22:])
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    path.write_bytes(data[:-22] + end + struct.pack("<4sIQI", b"PK\6\7", 0, len(data) - 22, 1) + data[-22:])


def nested_tuples(depth: int) -> bytes:
    """A dictionary whose key is a pair of pairs of pairs: hashing it takes 2**depth steps."""
    doubled = b"N\x85q\x00" + b"".join(b"h%c\x86q%c" % (level, level + 1) for level in range(depth))
    return b"\x80\x02}(" + doubled + b"Nu."


def nested_tuples_by_long_names(depth: int) -> bytes:
    """The same, in the instructions for what is remembered after the first 256 things."""
    levels = (struct.pack("<cicci", b"j", 256 + level, b"\x86", b"r", 257 + level) for level in range(depth))
    return b"\x80\x02}(N\x85r" + struct.pack("<i", 256) + b"".join(levels) + b"Nu."


BOMBS = {
    "many dictionaries": b"\x80\x02(" + b"}" * (3 * MIB) + b"t.",
    "more than the limit": pickle.dumps("x" * (MAX_PICKLE_BYTES + 1), 2),
    "a byte array": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "nested tuples": nested_tuples(60),
    "nested tuples by long names": nested_tuples_by_long_names(60),
    "few instructions too many": b"\x80\x02(" + b"N" * MAX_INSTRUCTIONS + b"t.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_would_exhaust_the_machine_is_refused_before_torch_reads_it(bundle, monkeypatch, name):
    replace_pickle(bundle, BOMBS[name])
    check_refused_unread(bundle, monkeypatch, "refused")


@pytest.mark.parametrize("has_zip64", [False, True])
def test_a_pickle_that_inflates_is_refused_before_it_is_inflated(bundle, monkeypatch, has_zip64):
    deflate_pickle(bundle, 200)
    if has_zip64:
        add_zip64_end(bundle)
    assert bundle.stat().st_size < 3 * MIB
    check_refused_unread(bundle, monkeypatch, "compressed" if has_zip64 else "directory")


def check_refused_unread(path, monkeypatch, text: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "_load", lambda _: pytest.fail("torch was given the archive"))
        tracemalloc.start()
        start = time.process_time()
        try:
            with fails(ExitStatus.BUNDLE, text):
                read_bundle(path)
            seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert seconds < 2 and peak < 50 * MIB, (seconds, peak)


def test_a_directory_that_readers_might_not_agree_on_is_refused(bundle):
    """Of two directories, torch might read the one that was not checked."""
    whole = bundle.read_bytes()
    for changed in (whole + whole[-98:], whole + b"\0", b"PK" + whole, whole[:-98] + b"\0" * 4 + whole[-98:]):
        bundle.write_bytes(changed)
        with fails(ExitStatus.BUNDLE, str(bundle)):
            read_bundle(bundle)
    bundle.write_bytes(whole)
    read_bundle(bundle)


def test_a_directory_that_says_it_stands_elsewhere_is_refused(bundle, monkeypatch):
    """zipfile looks for it before its end, to Python 3.12, and torch where it says it is. Here both ends are told right."""
    whole = bundle.read_bytes()
    (end,) = struct.unpack_from("<Q", whole, len(whole) - 34)
    bundle.write_bytes(b"moved" + whole[:-34] + struct.pack("<Q", end + 5) + whole[-26:])
    if sys.version_info < (3, 13):
        with zipfile.ZipFile(bundle) as archive:
            assert archive.testzip() is None
    check_refused_unread(bundle, monkeypatch, "directory")


def test_a_bundle_written_again_record_by_record_is_read(bundle, tracks):
    """What ``replace_pickle`` writes is refused for its pickle only."""
    with zipfile.ZipFile(bundle) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    replace_pickle(bundle, data)
    assert torch.equal(read_bundle(bundle).tracks.anchor_latents, tracks.anchor_latents)


@pytest.mark.parametrize("budget", [200, 20, 1])
def test_latents_that_overflow_when_cut_are_refused_and_nothing_is_written(tmp_path, budget):
    """Means of latents near the end of float32 are not finite."""
    stretches = make_stretches(smooth_latents())
    loud = replace(stretches, latents=stretches.latents.sign() * 3e38)
    write_bundle(tmp_path / "loud.pt", loud, manifest_for(loud))
    run = run_freres("repack", tmp_path / "loud.pt", "--budget", budget, "-o", tmp_path / "cut.pt")
    check_failure(run, ExitStatus.BUNDLE, "latents: expected finite numbers")
    assert [path.name for path in tmp_path.iterdir()] == ["loud.pt"]


def test_tensors_that_overlap_cannot_multiply(bundle):
    """Of two tensors, one may lie over the other, but a bundle has no room for thousands that do."""
    outer = torch.load(bundle, weights_only=True)
    many = {f"more_{n}": outer["tensors"]["anchor_latents"][n % 2 :] for n in range(3)}
    tensors = {**outer["tensors"], **many}
    manifest = {**json.loads(outer["manifest"]), "tensors": describe_tensors(tensors)}
    text = encode_manifest(manifest)
    digest = hashlib.sha256(text.encode()).hexdigest()
    torch.save({**outer, "tensors": tensors, "manifest": text, "manifest_sha256": digest}, bundle)
    with pytest.raises(BundleError, match="unknown"):
        read_bundle(bundle)
