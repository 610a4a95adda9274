"""Download a checkpoint from the model hub: only the files that are read, with every failure as a one-line error."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable
from pathlib import Path

from freres_cli.errors import BackboneError, ResourceError

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

# Small files that both halves read. Never *.bin, *.pt or *.py: pickles and code are never loaded.
CONFIG_FILES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "chat_template.json",
    INDEX_FILE,
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)

OFFLINE_HINT = (
    "pass a local folder, or download it on a machine with a network; HF_HUB_OFFLINE and HF_HOME are honoured"
)


def fetch(model_id: str, revision: str | None, names: Iterable[str]) -> Path:
    """Download the files in ``names`` that are not cached, and return the local snapshot folder of the hub model.

    The folder is named after the commit that ``revision`` resolves to. Files that the hub does not have are missing from
    it, and without a network so are files that are not cached. Raises BackboneError if the model does not exist, is
    gated or cannot be reached, ResourceError if the disk is full.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()  # we report a failure in one line; warnings about retries would only add noise
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(names)))
    except errors.GatedRepoError as error:
        hint = "accept its terms on the hub, then log in with: hf auth login"
        raise BackboneError(f"{model_id}: this model is gated", hint) from error
    except errors.RevisionNotFoundError as error:
        raise BackboneError(f"{model_id}: no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise BackboneError(f"{model_id}: no such model on the hub, or it is private", "check the name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        if held := getattr(error, "snapshot_path", None):  # a snapshot of which some of the files are cached
            return Path(held)
        raise BackboneError(
            f"{model_id}: not in the local cache, and the hub cannot be reached", OFFLINE_HINT
        ) from error
    except errors.HFValidationError as error:
        raise BackboneError(f"{model_id}: not a model id: expected ORGANISATION/NAME") from error
    # Faults of the connection, of the disk, and of the native downloader, which only raises RuntimeError. HTTPError comes
    # from whichever HTTP library huggingface_hub uses; its errors module imports it without declaring the export.
    except (errors.HTTPError, errors.XetDownloadError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
        raise _download_failure(model_id, error) from error


def _download_failure(model_id: str, error: Exception) -> BackboneError | ResourceError:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return ResourceError(f"{model_id}: the disk is full", "free some space, or set HF_HOME to another disk")
    first_line = str(error).strip().partition("\n")[0]
    return BackboneError(f"{model_id}: download failed: {first_line}", OFFLINE_HINT)
