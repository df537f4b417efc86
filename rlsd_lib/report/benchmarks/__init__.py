"""Public benchmarks through lmms-eval and lm-eval: the commands, and what comes back."""
