"""The run directory: claimed, written by a strict papermill, read back; and suites of runs."""


class NotebookError(RuntimeError):
    """A cell raised, the kernel died, or the notebook never finished its run."""


class Interrupted(NotebookError):
    """Ctrl-C or a SIGTERM ended the notebook; its run can be resumed."""
