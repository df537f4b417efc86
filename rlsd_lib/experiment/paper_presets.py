"""The presets of real size as rows of `Preset`: the paper's experiment and its text sibling.

Two presets replicate the paper: `qwen3-vl-8b` as its text (arXiv 2604.03128 v2) prints it, and
`qwen3-vl-8b-script` as the launch script of its released code sets it. Nothing here was run at this
size.
"""

from typing import Any

# The paper's settings that carry over to every size (PAPER: AdamW, weight decay 0.01, clip 1.0).
PAPER = {
    # In every method alike, so that their steps can be compared on a CPU too.
    "completion_head": True,
    "num_generations": 8,
    "temperature": 1.0,
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lambda_init": 0.5,
    "lambda_decay_steps": 50,
    "epsilon_w": 0.2,
    "teacher_model_kind": "snapshot",
    "teacher_sync_steps": 10,
}

REAL = {
    **PAPER,
    # Rollouts come from vLLM on the training GPUs, which sleeps while they train.
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_enable_sleep_mode": True,
    "learning_rate": 1e-6,
    "max_steps": 200,
    "save_steps": 20,
    "save_total_limit": 2,
}

DISTILLING = ("opsd", "opsd_teacher_top1", "opsd_student_top1")
DISTILLING += ("opsd_value", "opsd_contrast", "opsd_value_contrast")
# OPSD's teacher reads a verified trace, RLSD's the final answer alone.
TRACES = {name: {"privileged": "trace"} for name in (*DISTILLING, "grpo_opsd")}


def _by_method(room: int, rate: float = 1e-5) -> dict[str, dict[str, Any]]:
    """What the distillation methods change: a trace, as SDPO's peer, is as long as a completion."""
    longer = {"max_teacher_prompt_length": room}
    distilling = {name: {**longer, "learning_rate": rate} for name in (*DISTILLING, "sdpo")}
    return {**distilling, "grpo_opsd": longer}


QWEN3_VL_8B: dict[str, Any] = {
    "summary": "the paper as printed: Qwen3-VL-8B-Instruct on MMFineReason-123K",
    "model": "Qwen/Qwen3-VL-8B-Instruct",
    "sees_images": True,  # the vision tower is trained like everything else
    "task": "mmfinereason",
    "task_options": {"reward": "binary"},
    "task_by_method": TRACES,
    "training": {
        **REAL,
        "per_device_train_batch_size": 2,
        "max_completion_length": 4096,
        "max_teacher_prompt_length": 4608,  # the question's 4096, the template and the answer
        "vllm_gpu_memory_utilization": 0.6,
        "vllm_max_model_length": 8192,
    },
    "by_method": _by_method(8704),
    "train_size": -1,
    "test_size": 256,
    "num_samples": 1,
    "evaluation_batch_size": 16,
    "save_model": True,
    "max_prompt_length": 4096,
    "rollouts_per_step": 2048,  # 256 prompts, 8 rollouts each
    "processes": 8,
    "accelerate": "fsdp2",
}

QWEN3_VL_8B_SCRIPT = {
    **QWEN3_VL_8B,
    "summary": "the paper as its released script sets it: decay 60, snapshot every 20, format reward",
    "task_options": {"reward": "weighted"},
    "training": {
        **QWEN3_VL_8B["training"],
        "lambda_decay_steps": 60,
        "teacher_sync_steps": 20,
        "delta": 3.0,  # the dual clip; it never binds with one update per rollout
    },
}

QWEN3_TEXT_FULL: dict[str, Any] = {
    "summary": "Qwen3-1.7B on DeepScaleR's problems, all weights, one GPU of 80 GB",
    "model": "Qwen/Qwen3-1.7B",
    "task": "maths",
    "task_options": {"reward": "binary"},
    "task_by_method": TRACES,
    "training": {
        **REAL,
        "per_device_train_batch_size": 4,
        "max_completion_length": 3072,
        "max_teacher_prompt_length": 1536,
        "chat_template_kwargs": {"enable_thinking": False},
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": 4096,
    },
    "by_method": _by_method(4608),
    "train_size": -1,
    "test_size": 250,
    "save_model": True,
    "max_prompt_length": 1024,
    "rollouts_per_step": 256,  # 32 prompts, 8 rollouts each
}

QWEN3_TEXT = {
    **QWEN3_TEXT_FULL,
    "summary": "Qwen3-1.7B with LoRA on DeepScaleR's problems, one GPU of 24 GB or more",
    "model_options": {"dtype": "bfloat16"},
    "lora": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "target_modules": "all-linear"},
    # An adapter takes about ten times the rate of all weights, for every method.
    "training": {**QWEN3_TEXT_FULL["training"], "learning_rate": 1e-5},
    "by_method": _by_method(4608, 1e-4),
}

REAL_PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-vl-8b": QWEN3_VL_8B,
    "qwen3-vl-8b-script": QWEN3_VL_8B_SCRIPT,
    "qwen3-text": QWEN3_TEXT,
    "qwen3-text-full": QWEN3_TEXT_FULL,
}
