"""The run directory: claimed, written by a strict papermill, read back; and suites of runs."""
