"""One rank of a sharded run: two steps of RLSD, whose metrics rank 0 writes down."""

import json
import sys
from pathlib import Path

import tiny


def main(folder: Path, backend: str, processes: int) -> None:
    trainer = tiny.trainer(
        folder,
        max_steps=2,
        use_cpu=False,
        bf16=True,
        ddp_backend=backend,
        # The batch of one process, shared.
        per_device_train_batch_size=4 // processes,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        logged = [row for row in trainer.state.log_history if "loss" in row]
        (folder / "steps.json").write_text(json.dumps(logged))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
