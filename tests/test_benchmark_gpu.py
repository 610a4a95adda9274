"""The benchmark of levers on a GPU, here with a small model on the CPU: each lever is off when it should be, and on again."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from freres_cli.backbones import attention, engine, fused_layers, token_steps
from freres_cli.cli.benchmark.gpu import CHUNK_BY_BYTES, NUM_QUESTIONS, SHORT_ANSWER, measure_session


class Recorder:
    """A session that notes which levers are on when it is asked."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def forget_prefix(self):
        self.seen.append("new")

    def ask(self, question, max_new_tokens):
        is_whole = engine.fit_long_chunk(46102) != CHUNK_BY_BYTES
        kept = (attention.can_attend_long is REAL[0], is_whole, token_steps.can_record is REAL[1])
        levers = (*kept, fused_layers._takes is REAL[2])
        self.seen.append((max_new_tokens, *levers))
        return SimpleNamespace(ttft_s=0.5, tpot_s=0.25, num_new_tokens=max_new_tokens)

    def ask_many(self, questions, max_new_tokens):
        self.seen.append((len(questions), max_new_tokens))


REAL = (attention.can_attend_long, token_steps.can_record, fused_layers._takes)


def test_each_lever_is_on_and_off_in_turn():
    session = Recorder(SimpleNamespace(device=torch.device("cpu")))
    figures = measure_session(session, repeat=2, num_new=7)
    on = (True, True, True, True)
    once = ["new", (1, *on), "new", (1, True, True, True, False)]
    once += ["new", (1, False, True, True, True), "new", (1, False, False, True, True)]
    once += ["new", (7, *on), (7, *on), (7, True, True, False, True)]
    once += ["new", (token_steps.STEPS_BEFORE_RECORDING + 2, True, True, True, False), (7, True, True, True, False)]
    once += [(NUM_QUESTIONS, SHORT_ANSWER), *[(SHORT_ANSWER, *on)] * NUM_QUESTIONS]
    assert session.seen == ["new", (1, *on), *once, *once]
    assert figures["runs"] == 2 and figures["cudnn_over_flash"]["median"] == 1
    assert (attention.can_attend_long, token_steps.can_record, fused_layers._takes) == REAL
