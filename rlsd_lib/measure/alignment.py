"""One step under the lens: does a credit function point along the gradient of success?

On the same rollouts every credit function gives a policy gradient. The gradient of the true success
probability is known without reinforcement where a task knows its right chains (`measure.exact`).
Their cosine says what one step is worth, the noise-to-signal ratio how much of a batch's gradient is
chance, and the shares where the blame goes. No training is needed, so that a credit function can be
judged in a minute; whether the outcome follows is another question.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.exact import right_chains
from rlsd_lib.measure.intervals import student_interval
from rlsd_lib.measure.logps import forward, log_probabilities, of_tokens, padded
from rlsd_lib.prompts import COLUMN, teacher_prompt
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.encode import messages_of


class Batch(NamedTuple):
    """Rollouts as a credit function sees them; N of them, grouped by problem, T tokens.

    `gap` (N, T) is of a live teacher that reads the row's reference, `wrong_gaps` (1, N, T) of one
    that reads the next problem's.
    """

    rows: list[Row]
    completions: list[list[int]]
    rewards: Tensor  # (N,)
    advantages: Tensor  # (N,)
    gap: Tensor
    wrong_gaps: Tensor
    mask: Tensor  # (N, T)
    first_error: Tensor  # (N,), T where there is none
    decisions: Tensor  # (N, T)
    fillers: Tensor  # (N, T)


Blame = Callable[[Batch], Tensor]  # the token credit (N, T) of a batch
