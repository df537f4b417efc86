"""The embedded lab: arithmetic with worked chains, coloured squares, and tiny models."""
