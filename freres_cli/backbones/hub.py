"""Fetching a checkpoint from the model hub: only the files a model is read from, and each failure as one line."""

from __future__ import annotations

import errno
from pathlib import Path

from freres_cli.errors import BackboneError, ResourceError

# Never *.bin, *.pt or *.py: pickles and code are not read.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")

_OFFLINE_HINT = "pass a local folder, or download it where there is a network; HF_HUB_OFFLINE and HF_HOME are honoured"


def fetch(model_id: str, revision: str | None, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """The local snapshot folder of a hub model, whose name is the resolved revision. Downloads what is not cached.

    Raises BackboneError if it does not exist, is gated or cannot be reached, ResourceError if the disk is full.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        hint = "accept its terms on the hub, then log in with: hf auth login"
        raise BackboneError(f"{model_id}: this model is gated", hint) from error
    except errors.RevisionNotFoundError as error:
        raise BackboneError(f"{model_id}: no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise BackboneError(f"{model_id}: no such model on the hub, or it is private", "check the name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise BackboneError(
            f"{model_id}: not in the local cache, and the hub cannot be reached", _OFFLINE_HINT
        ) from error
    except errors.HFValidationError as error:
        raise BackboneError(f"{model_id}: not a model id: expected ORGANISATION/NAME") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _download_failure(model_id, error) from error


def _download_failure(model_id: str, error: OSError) -> BackboneError | ResourceError:
    if error.errno == errno.ENOSPC:
        return ResourceError(f"{model_id}: the disk is full", "free some space, or set HF_HOME to another disk")
    first_line = str(error).strip().partition("\n")[0]
    return BackboneError(f"{model_id}: download failed: {first_line}", _OFFLINE_HINT)
