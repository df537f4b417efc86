"""Read by lmms-eval beside the task file: its own functions, put together for another split."""

from typing import Any

from lmms_eval.tasks._task_utils.reasoning_utils import (
    make_reasoning_doc_to_messages,
    make_reasoning_process_results,
)
from lmms_eval.tasks.wemath.reasoning.utils import SYSTEM_PROMPT
from lmms_eval.tasks.zerobench.utils import zerobench_doc_to_visual as visual


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Return the question alone: how to answer is said in the system prompt."""
    return doc["question_text"].strip()


messages = make_reasoning_doc_to_messages(visual, text, system_prompt=SYSTEM_PROMPT)
results = make_reasoning_process_results("zerobench", text, gt_key="question_answer")
