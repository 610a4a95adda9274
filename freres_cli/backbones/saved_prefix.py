"""A prefilled video in a file, so that it need not be prefilled again: one safetensors file, which runs no code.

The file names what it was made from by a digest: of the rows that were prefilled, so of bundle, adapter, prompt and
positions; and of the model, its precision, numbers of the cache, attention kernel, device and torch. For any
other digest it is not used.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freres_cli.backbones.base import LanguageModel, PromptRows
from freres_cli.backbones.engine import (
    PREFILL_CHUNK_TOKENS,
    VideoPrefix,
    check_context,
    memory_of,
    prefill_rows,
    settle_length,
)
from freres_cli.backbones.sizes import find_head_width
from freres_cli.backbones.weight_samples import add_weights, bytes_of
from freres_cli.devices import AS_COMPUTED, synchronize
from freres_cli.errors import BundleError, FreresError, explain_no_file, size_of
from freres_cli.files import write_atomically
from freres_cli.records import VideoTokens

SUFFIX = ".prefix.safetensors"
HEADER = "freres.prefix/1"
HINT = "delete it, or leave out --save-prefix"
# Of what a cache holds, by the names of the format.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


def open_prefix(
    model: LanguageModel, prefix_ids: tuple[int, ...], video: VideoTokens, text_after: str, path: Path
) -> VideoPrefix:
    """``engine.prefill_video``, but read from a file if that holds it, and else written to it.

    ``model``, ``prefix_ids``, ``video``, ``text_after``: as ``prefill_video`` takes them. ``path``: the file. What was read
    or written, what it took, and why an older file was not used is in the result's notes; so is why nothing could be
    read or written. Raises as ``prefill_video``, and BundleError for a file that is not a saved prefix, or is damaged.
    """
    # It imports transformers, which whoever only reads tokens does without.
    from freres_cli.backbones.cache import ReservedLayer

    rows = model.splice(prefix_ids, video, text_after)
    notes = check_context(model, len(rows), rows.next_position)
    cache = model.new_cache()
    settle_length(cache, rows)
    obstacle = _find_obstacle(path)
    if not all(isinstance(layer, ReservedLayer) for layer in cache.layers):
        obstacle = f"prefix not saved: {model.family} keeps a state, not a row for each token"
    if obstacle is not None:
        prefix = prefill_rows(model, rows, len(video))
        prefix.notes += (obstacle,)
        return prefix
    digest = digest_prefix(model, rows)
    stale: tuple[str, ...] = ()
    if path.exists() or path.is_symlink():
        start = time.perf_counter()
        header = read_header(path)
        if header["made_from"] == digest and _fill(path, header, model, len(rows), cache):
            synchronize(model.device)
            spent_s = time.perf_counter() - start
            told: tuple[str, ...] = (
                f"prefix read from {path} in {spent_s:.2f} s; its prefill took {header['prefill_s']:.2f} s",
            )
            if spent_s > header["prefill_s"]:
                told += (f"reading the prefix took longer than its prefill: {HINT}",)
            return VideoPrefix(cache, len(rows), len(video), rows.next_position, spent_s, (*notes, *told))
        stale = (f"{path}: made from another bundle, model or setting: written again",)
    prefix = prefill_rows(model, rows, len(video))
    prefix.notes += (*stale, write_prefix(path, prefix, digest))
    return prefix


def _find_obstacle(path: Path) -> str | None:
    """A note on why a place can hold no prefix, or not be read, whatever stands there. ``None`` if it can."""
    try:
        str(path).encode()  # safetensors takes no other names
        if path.is_file():
            path.open("rb").close()
    except (UnicodeEncodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the name is not UTF-8"
        return f"prefix neither read nor saved: {path}: {reason}"
    return None


def _fill(path: Path, header: dict[str, Any], model: LanguageModel, num_rows: int, cache: Any) -> bool:
    """Fill an empty cache from a file, or return False if another run has replaced it since its header was read."""
    from freres_cli.backbones.cache import reserve_rows

    reserve_rows(cache, num_rows)
    try:
        with memory_of(model, num_rows):
            read_rows(path, header, model, num_rows, cache)
    except BundleError:
        if read_header(path) == header:
            raise
        return False
    return True


def digest_prefix(model: LanguageModel, rows: PromptRows) -> str:
    """What a prefilled video depends on, as a SHA-256. ``rows``: all that is prefilled.

    Ours. The weights of the decoder are sampled: the fingerprint has only the projector's.
    """
    facts = {
        "model": model.fingerprint,
        "dtype": str(model.dtype),
        "attention": model.attention,
        "device": model.device.type,
        "torch": torch.__version__,
        "next_position": rows.next_position,
        "shape": [len(rows), rows.pieces[0].table.shape[1]],
        **({} if model.storage == AS_COMPUTED else asdict(model.storage)),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for chunk in rows.split(PREFILL_CHUNK_TOKENS):
        digest.update(bytes_of(chunk.embeds))
    digest.update(bytes_of(rows.positions))
    add_weights(digest, model.decoder)
    return digest.hexdigest()


def write_prefix(path: Path, prefix: VideoPrefix, digest: str) -> str:
    """Write a prefilled video atomically and return a note that says so, or why it could not be written.

    ``path``: the file. ``prefix``: what to write. ``digest``: from ``digest_prefix``.
    """
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(prefix.cache.layers):
        tensors |= {f"keys.{number}": layer.keys, f"values.{number}": layer.values}
    header = {"made_from": digest, "prefill_s": prefix.prefill_s}
    try:
        write_atomically(path, lambda file: _write_tensors(file, tensors, header), force=True, flag="--save-prefix")
    except FreresError as error:
        return f"prefix not saved: {error.message}"
    return f"prefix saved in {path}, {size_of(path.stat().st_size)}"


def _write_tensors(file: IO[bytes], tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a safetensors file. Its package's own ``save_file`` replaces the file by another one, which is neither locked
    nor synced and has another mode, and its ``save`` needs the whole cache a second time."""
    facts: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        tensor, start, end = tensors[name], end, end + tensors[name].nbytes
        facts[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}

    def write_header(content: str) -> None:
        metadata = {HEADER: json.dumps({**header, "content": content}, sort_keys=True)}
        text = json.dumps({"__metadata__": metadata, **facts}).encode()
        text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight bytes
        file.write(len(text).to_bytes(8, "little") + text)

    # The digest stands before the numbers, but is known after them, as they are copied from a device only once.
    write_header("0" * 2 * hashlib.sha256().digest_size)
    content = _digest_of(tensors, file.write)
    file.seek(0)
    write_header(content)


def _digest_of(tensors: dict[str, Tensor], write: Callable[[Any], object] | None = None) -> str:
    """The digest of all names and numbers. ``write``: gets the bytes of each tensor, by the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = bytes_of(tensors[name])
        digest.update(f"{name} ".encode())
        digest.update(values)
        if write is not None:
            write(values)
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """What a saved prefix says of itself: ``made_from``, ``content`` and ``prefill_s``. Raises BundleError."""
    if not path.is_file():
        raise BundleError(f"{explain_no_file(path)}: expected a saved prefix", HINT)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: not a saved prefix, or damaged: {str(error).splitlines()[0][:200]}", HINT
        ) from error
    kinds = {"made_from": str, "content": str, "prefill_s": float}
    if not isinstance(header, dict) or any(not isinstance(header.get(key), kind) for key, kind in kinds.items()):
        raise BundleError(f"{path}: not a saved prefix: expected the header {HEADER}", HINT)
    return header


def read_rows(path: Path, header: dict[str, Any], model: LanguageModel, num_rows: int, cache: Any) -> None:
    """Fill an empty cache from a saved prefix, after checking it.

    ``path``, ``header``: the file, and what ``read_header`` gave. ``model``: whose cache it is. ``num_rows``: how many rows
    it has to hold. ``cache``: the empty cache. Raises BundleError for other tensors than the model's, or other bytes than
    were written.
    """
    from freres_cli.backbones.quantized_cache import row_format

    config = model.decoder.config
    numbers, dtype = row_format(find_head_width(config), model.dtype, model.storage.kv)
    shape = (1, config.num_key_value_heads, num_rows, numbers)
    names = {f"{part}.{number}" for part in ("keys", "values") for number in range(len(cache.layers))}
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != names:
                raise BundleError(
                    f"{path}: damaged prefix: expected keys and values of {len(cache.layers)} layers", HINT
                )
            for name in sorted(names):
                # Before it is read: a header may claim any size.
                if (found := tuple(file.get_slice(name).get_shape())) != shape:
                    raise BundleError(f"{path}: damaged prefix: {name}: expected shape {shape}, got {found}", HINT)
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: damaged prefix: {str(error).splitlines()[0][:200]}", HINT) from error
    if any(tensor.dtype != dtype for tensor in tensors.values()) or _digest_of(tensors) != header["content"]:
        raise BundleError(f"{path}: damaged prefix: its numbers are not those that were written", HINT)
    for number, layer in enumerate(cache.layers):
        layer.append(*(tensors.pop(f"{part}.{number}").to(model.device) for part in ("keys", "values")))
