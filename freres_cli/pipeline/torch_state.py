"""What the Python API needs of PyTorch, whatever its caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from freres_cli.errors import UsageError
from freres_cli.pipeline.models import LOADING


@contextmanager
def plain_torch() -> Iterator[None]:
    """Leave the caller's inference mode, automatic casts and default device, in this thread, inside the block.

    Later calls could not extend a cache that was made in inference mode, a bundle would not have the dtype that it records,
    and what belongs on the CPU would be made elsewhere. The default dtype is the whole process's, and other threads may rely
    on it: another one than float32 is refused. Raises ``UsageError``.
    """
    _check_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def _check_default_dtype() -> None:
    if torch.get_default_dtype() == torch.float32:
        return
    with LOADING:  # which replaces it for a while
        found = torch.get_default_dtype()
    if found != torch.float32:
        name = str(found).removeprefix("torch.")
        hint = "call torch.set_default_dtype(torch.float32) first: the model has its own dtype"
        raise UsageError(f"PyTorch's default dtype: expected float32, got {name}", hint)
