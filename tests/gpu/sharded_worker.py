"""One rank of a sharded run: RLSD in fp32 and in bf16, whose metrics rank 0 writes down."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dense
import tiny
import torch


def train(folder: Path, processes: int, **settings: Any) -> dict[str, list[dict[str, float]]]:
    """Metrics of three steps by dtype, on rollouts that no number of ranks changes."""
    found = {}
    for dtype in ("fp32", "bf16"):
        trainer = tiny.trainer(
            folder,
            teacher_sync_steps=1,
            bf16=dtype == "bf16",
            # The batch of one process, shared.
            per_device_train_batch_size=8 // processes,
            gradient_accumulation_steps=1,
            # Bounded below, or Adam would turn a rounding error of a vanishing gradient into a step.
            adam_epsilon=1.0,
            learning_rate=0.5,
            **settings,
        )
        assert trainer.accelerator.num_processes == processes
        dense.script(trainer).train()
        found[dtype] = [row for row in trainer.state.log_history if "loss" in row]
    return found


def main(folder: Path, device: str, backend: str, processes: int) -> None:
    # The configuration's bf16 would rule the run in fp32 too.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    place: Any = nullcontext()
    if device == "cpu":
        from test_sharded import on_a_cpu

        torch.distributed.init_process_group(backend)
        place = on_a_cpu()
    with place:
        found = train(folder, processes, use_cpu=device == "cpu", ddp_backend=backend)
    if os.environ.get("RANK", "0") == "0":
        (folder / "steps.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
