"""What the tests with the real vLLM share: prompts, and what ``freres ask`` says about the same bundle.

Imported only where vLLM is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from freres_cli.integrations.vllm_bundles import load_payload
from freres_cli.pipeline.session import Session
from freres_cli.workflows.verify import run_steps


def prompt_about(session: Session, bundle: Path, question: str) -> dict[str, Any]:
    """The prompt of ``freres ask``, with the bundle where its video goes."""
    ids = session.model.prompt(question)
    pad: int = session.model.video_token_id  # type: ignore[attr-defined]
    return {
        "prompt_token_ids": [*ids.prefix, pad, *ids.suffix],
        "multi_modal_data": {"video": load_payload(bundle)},
    }


def sampling(num: int = 16, **more: Any):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=num, logprobs=0, **more)


def log_probs_of(said: Any) -> torch.Tensor:
    """The log-probability of each token of one answer of vLLM's."""
    steps = zip(said.token_ids, said.logprobs, strict=True)
    return torch.tensor([step[token].logprob for token, step in steps])


@torch.no_grad()
def our_log_probs(session: Session, question: str, answer: list[int]) -> torch.Tensor:
    """What freres gives each token of an answer, in one pass of its own for each."""
    model = session.model
    ids = model.prompt(question)
    rows = model.splice(ids.prefix, session.tokens, session.text_after)
    rows = rows.then(model.text_rows(ids.suffix, len(rows), rows.next_position))
    steps = run_steps(model, rows, answer[:-1]).log_softmax(-1)
    return steps.gather(1, torch.tensor(answer)[:, None])[:, 0]
