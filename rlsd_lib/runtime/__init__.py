"""What keeps a training run right on real machines: sharding, checkpoints, faults, vLLM."""
