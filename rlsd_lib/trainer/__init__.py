"""`RLSDTrainer`: everything that changes against TRL's `GRPOTrainer`."""
