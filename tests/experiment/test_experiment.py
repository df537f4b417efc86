"""What an experiment shows beside its training."""

from types import SimpleNamespace

from rlsd_lib.experiment import experiment as module
from rlsd_lib.experiment.experiment import Experiment


def test_every_problem_is_looked_at_with_draws_of_its_own(monkeypatch):
    """The same draws for all would make the groups of similar problems agree or differ together."""
    seen = []

    def look(model, tokenizer, task, row, config, *, seed, teacher):
        seen.append((row, seed))
        return [SimpleNamespace(reward=reward) for reward in ([1.0, 1.0], [0.0, 1.0])[row == 5]]

    monkeypatch.setattr(module, "look", look)
    experiment = Experiment.__new__(Experiment)
    experiment.model = experiment.tokenizer = experiment.config = experiment.teacher_model = None
    experiment.task = SimpleNamespace(test=range(9))
    experiment.parameters = SimpleNamespace(seed=7)
    assert [rollout.reward for rollout in experiment.look_at_mixed(3)] == [1.0, 0.0]
    assert seen == [(3, 7), (4, 8), (5, 9)]
