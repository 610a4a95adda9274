"""The steps of a training: which weights are kept, when it stops, and how validation is shared out."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from freres_cli.evaluation.cells import parse_budgets
from freres_cli.method.fusion import FreResModules, ModuleShape
from freres_cli.training.state import read_state
from freres_cli.workflows.training_loop import Recipe, Score, TrainingLoop

BUDGETS = parse_budgets("0.5,0.25")


class Scripted(TrainingLoop):
    """A loop whose validations have these ``losses``, one after the other, and whose steps add 1 to a bias."""

    losses = ()

    def validate(self):
        self.asked = getattr(self, "asked", -1) + 1
        return Score(None, self.losses[self.asked])

    def _step(self, step):
        with torch.no_grad():
            self.modules.type_embedding.add_(1.0)
        return 1.0


def run_script(tmp_path, losses, **recipe):
    modules = FreResModules(ModuleShape(4, 2, 2))
    changed = {"num_steps": 2 * len(losses) - 2, "validate_every": 2, **recipe}
    workers = SimpleNamespace(is_first=True)
    loop = Scripted(Recipe(BUDGETS, **changed), None, None, modules, (), (), workers, {"run": "a"})
    loop.losses = losses
    return loop.train({}, tmp_path / "state", lambda _: None)


def steps_in(weights):
    """How many steps these weights have seen."""
    return round(float(weights["type_embedding"].mean()))


def test_the_weights_of_the_lowest_loss_are_kept(tmp_path):
    done = run_script(tmp_path, [5.0, 4.0, 2.0, 3.0, 2.5])
    assert [row[0] for row in done["history"]] == [0, 2, 4, 6, 8] and done["steps"] == 8
    assert steps_in(done["best"]) == 4
    # Also by a run that goes on from the last state.
    assert steps_in(read_state(tmp_path / "state")["best"]) == 4


def test_weights_that_never_got_better_are_the_untrained_ones(tmp_path):
    assert steps_in(run_script(tmp_path, [1.0, 2.0, 1.0, 3.0])["best"]) == 0


@pytest.mark.parametrize("patience", [1, 2])
def test_training_ends_after_so_many_validations_without_gain(tmp_path, patience):
    done = run_script(tmp_path, [5.0, 4.0, 4.5, 4.0, 1.0], patience=patience)
    assert done["steps"] == 2 * (1 + patience) and len(done["history"]) == 2 + patience


class Part(SimpleNamespace):
    """One of several workers, that knows nothing of the others."""

    def gather(self, value):
        self.mine = value
        return [value]


class Answering(TrainingLoop):
    """A loop that notes what is asked together. Every option has a score of its own."""

    def _scores(self, example, budget, picked):
        self.asked.append((example.name, budget, tuple(picked)))
        dice = np.random.default_rng([example.name, budget])
        scores = torch.from_numpy(dice.normal(size=(len(example.questions), 3)))
        return [scores[i] for i in picked]


def answering(rank, count, questions_a_video=2, budgets=BUDGETS):
    question = SimpleNamespace(truth=1, answers=((1,), (2, 3), (4,)))
    held_out = [SimpleNamespace(name=name, questions=(question,) * (3 + name)) for name in range(5)]
    recipe = Recipe(budgets, 1, questions_a_video=questions_a_video)
    loop = Answering(recipe, None, None, None, (), held_out, Part(rank=rank, count=count), {})
    loop.asked = []
    return loop


def test_validation_is_shared_out_and_has_the_score_of_one_worker():
    alone = answering(0, 1)
    score = alone.validate()
    loops = [answering(rank, 2) for rank in range(2)]
    for loop in loops:
        loop.validate()
    parts = [loop.asked for loop in loops]
    assert sorted(chain(*parts)) == sorted(alone.asked) and not {*parts[0]} & {*parts[1]}
    assert abs(len(parts[0]) - len(parts[1])) < len(alone.asked) / 4
    for loop in loops:
        loop.workers.gather = lambda _: [other.workers.mine for other in loops]
        assert loop.validate() == score


@pytest.mark.parametrize("count", [2, 4])
def test_each_worker_validates_at_every_budget(count):
    """A video costs more at a larger budget."""
    budgets = parse_budgets("0.5,0.25,0.1,0.05")
    for rank in range(count):
        loop = answering(rank, count, budgets=budgets)
        loop.validate()
        assert {budget for _, budget, _ in loop.asked} == {*range(len(budgets))}


def test_validation_asks_as_many_questions_at_a_time_as_a_step():
    few, all_at_once = answering(0, 1, 2), answering(0, 1, 100)
    assert few.validate() == all_at_once.validate()
    assert max(len(picked) for *_, picked in few.asked) == 2
    for name in range(5):
        assert [i for own, budget, picked in few.asked if (own, budget) == (name, 0) for i in picked] == [
            *range(3 + name)
        ]
