"""Run several questions about one prefilled video at once.

Questions of different lengths are padded on the left, between the video and the question; the padding is hidden from
attention and takes up no positions. A recurrent state cannot skip masked tokens, so families that keep one (their cache
cannot be cropped) run questions of one length at a time instead. Either way, the answers are those of one question at a
time; in float32, logits change by about 1e-5.

All continue one copy of the video, as ``shared_prefix`` has it. Of families with a recurrent state, the cache of n questions
takes n times the memory of the prefix. The caller chooses n.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from freres_cli.backbones.base import LanguageModel, PromptRows
from freres_cli.backbones.engine import VideoPrefix, check_context, check_scores, lend_cache, memory_of
from freres_cli.backbones.shared_prefix import SharedCache, can_share, share
from freres_cli.errors import BackboneError

Ids = Sequence[int]
MAX_ROWS = 1 << 14  # of questions and options held at once, where the caller has no limit (ours)


@dataclass
class Branches:
    """Sequences that continue one prefix. ``cache``: has one row for each. ``is_token``: (B, n) bool, False where the
    cache holds padding."""

    cache: Any
    is_token: Tensor

    def pick(self, rows: Sequence[int]) -> Branches:
        """A copy of these rows, which may repeat."""
        index = torch.tensor(rows, device=self.is_token.device)
        if isinstance(self.cache, SharedCache):
            return Branches(self.cache.pick(index), self.is_token[index])
        if getattr(self.cache, "is_croppable", True):
            # Picking puts new keys and values in the place of the old ones: to copy those first would only take memory.
            cache = copy.copy(self.cache)
            cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        else:
            cache = copy.deepcopy(self.cache)
        cache.reorder_cache(index)
        return Branches(cache, self.is_token[index])


def copies_video(prefix: VideoPrefix) -> bool:
    """Whether each question takes a copy of the video's cache."""
    return not can_share(prefix.cache)


@torch.no_grad()
def score_options_batch(
    model: LanguageModel,
    prefix: VideoPrefix,
    suffixes: Sequence[Ids],
    options: Sequence[Sequence[Ids]],
    max_rows: int = MAX_ROWS,
) -> list[Tensor]:
    """``engine.score_options`` for several questions: the log-likelihoods of each one's own options, (n,) float32.

    ``model`` and ``prefix`` are the language model and the video it has prefilled. ``suffixes``: the token ids after the
    video, for each question. ``options``: the token ids of the options of each question. ``max_rows``: of questions and
    options, that are held at once beside those of a shared video. Raises BackboneError if an option has no tokens or a
    prompt exceeds the model's context.
    """
    if len(suffixes) != len(options) or not all(own and all(own) for own in options):
        raise BackboneError("options: expected at least one option for each question, with at least one token each")
    scores: list[list[Any]] = [[0.0] * len(own) for own in options]
    longest = [len(suffix) + max(map(len, own)) for suffix, own in zip(suffixes, options, strict=True)]
    with _lend(model, prefix, longest) as trunk:
        for group in _groups(trunk, [len(suffix) for suffix in suffixes]):
            branches = trunk.pick([0] * len(group))
            questions = [model.text_rows(suffixes[i], prefix.num_tokens, prefix.next_position) for i in group]
            hidden = extend(model, branches, questions)
            first = model.logits(torch.stack([rows[-1] for rows in hidden])).log_softmax(-1)
            later = []
            for row, i in enumerate(group):
                for j, option in enumerate(options[i]):
                    scores[i][j] = first[row, option[0]]
                    later += [(row, i, j)] if len(option) > 1 else []
            lengths = [len(options[i][j]) for _, i, j in later]
            # Where each option continues a copy of the video's cache, no more copies fit than there are questions.
            own_rows = max(map(len, suffixes)) + max(lengths, default=0)
            most = max(1, max_rows // own_rows) if isinstance(trunk.cache, SharedCache) else len(suffixes)
            for part in _parts(_groups(trunk, lengths), most):
                chosen = [later[place] for place in part]
                twigs = branches.pick([row for row, _, _ in chosen])
                texts = [
                    model.text_rows(options[i][j][:-1], twigs.is_token.shape[1], questions[row].next_position)
                    for row, i, j in chosen
                ]
                for (_, i, j), rows in zip(chosen, extend(model, twigs, texts), strict=True):
                    ids = torch.tensor(options[i][j][1:], device=rows.device)
                    scores[i][j] = scores[i][j] + model.logits(rows).log_softmax(-1).gather(1, ids[:, None]).sum()
    return [torch.stack(own).cpu() for own in scores]


@torch.no_grad()
def answer_batch(
    model: LanguageModel, prefix: VideoPrefix, suffixes: Sequence[Ids], max_new_tokens: int
) -> list[list[int]]:
    """The greedy answer to each question, as token ids, ending with a stop token unless it reached ``max_new_tokens``.

    ``model`` and ``prefix`` are the language model and the video it has prefilled. ``suffixes``: the token ids after the
    video, for each question. Raises ContextError if a prompt exceeds the model's context.
    """
    answers: list[list[int]] = [[] for _ in suffixes]
    with _lend(model, prefix, [len(suffix) + max_new_tokens for suffix in suffixes]) as trunk:
        for group in _groups(trunk, [len(suffix) for suffix in suffixes]):
            branches, asked = trunk.pick([0] * len(group)), list(group)
            rows = [model.text_rows(suffixes[i], prefix.num_tokens, prefix.next_position) for i in asked]
            for _ in range(max_new_tokens):
                hidden = torch.stack([states[-1] for states in extend(model, branches, rows)])
                tokens = check_scores(model.logits(hidden)).argmax(-1).tolist()
                for i, token in zip(asked, tokens, strict=True):
                    answers[i].append(token)
                going = [row for row, token in enumerate(tokens) if token not in model.stop_ids]
                if not going:
                    break
                if len(going) < len(asked):
                    branches, asked = branches.pick(going), [asked[row] for row in going]
                index = branches.is_token.shape[1]
                rows = [model.text_rows([tokens[row]], index, rows[row].next_position) for row in going]
    return answers


def extend(model: LanguageModel, branches: Branches, rows: Sequence[PromptRows]) -> list[Tensor]:
    """Extend each sequence by some text. Returns the hidden states of each text, (its length, D)."""
    longest = max(map(len, rows))
    num_pads = [longest - len(part) for part in rows]
    embeds = torch.stack([pad(r.embeds, (0, 0, n, 0)) for r, n in zip(rows, num_pads, strict=True)])
    positions = torch.cat([pad(r.positions, (n, 0)) for r, n in zip(rows, num_pads, strict=True)], dim=1)
    is_token = torch.arange(longest, device=embeds.device) >= torch.tensor(num_pads, device=embeds.device)[:, None]
    branches.is_token = torch.cat([branches.is_token, is_token], dim=1)
    mask = None if bool(branches.is_token.all()) else branches.is_token
    with memory_of(model, branches.is_token.numel()):
        hidden = model.decode_batch(embeds, positions, mask, branches.cache)
    return [states[n:] for states, n in zip(hidden, num_pads, strict=True)]


@contextmanager
def _lend(model: LanguageModel, prefix: VideoPrefix, num_tokens: Sequence[int]) -> Iterator[Branches]:
    """The prefix as a single branch to start from. ``num_tokens``: the most tokens that each question adds."""
    if prefix.pruned is not None:
        raise BackboneError("questions: expected one at a time, because each prunes the video in its own way")
    longest = prefix.num_tokens + max(num_tokens, default=0)
    check_context(model, longest, prefix.next_position, prefix.num_tokens)
    with lend_cache(prefix) as cache:
        cache = share(cache) if can_share(cache) else cache
        yield Branches(cache, torch.ones(1, prefix.num_tokens, dtype=torch.bool, device=model.device))


def _parts(groups: Iterable[list[int]], most: int) -> Iterator[list[int]]:
    """The groups, ``most`` sequences at a time."""
    for group in groups:
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _groups(trunk: Branches, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Which sequences may run together: all of them, or those of one length if padding would change a state."""
    if getattr(trunk.cache, "is_croppable", True):
        if lengths:
            yield list(range(len(lengths)))
        return
    for length in dict.fromkeys(lengths):
        yield [place for place, own in enumerate(lengths) if own == length]
