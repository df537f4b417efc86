"""What became of the rows of a data set: how many were kept, and which were dropped for what."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rlsd_lib.runs.records import replace_text, write_json


@dataclass(frozen=True)
class Report:
    """What became of the rows: `faults` names the rows (from 0) that have each fault."""

    source: str
    rows: int
    kept: int
    faults: dict[str, list[int]]
    unknown_types: dict[str, int]  # how often each type without a grader occurs
    without_trace: int  # among the kept
    fingerprint: str  # of the kept rows, in order

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each fault that occurs."""
        return {fault: len(rows) for fault, rows in self.faults.items()}

    def summary(self) -> str:
        """Say in one line what was kept and what was dropped why."""
        parts = ", ".join(f"{fault} {count}" for fault, count in self.counts.items())
        return f"{self.source}: {self.kept} of {self.rows} rows kept; dropped: {parts or 'none'}"

    def write(self, folder: str | Path) -> None:
        """Write data_report.json (counts) and dropped.jsonl (row, fault) to an existing folder."""
        facts = {k: v for k, v in asdict(self).items() if k != "faults"}
        write_json(Path(folder) / "data_report.json", {**facts, "counts": self.counts})
        lines = [{"row": row, "fault": f} for f, rows in self.faults.items() for row in rows]
        replace_text(Path(folder) / "dropped.jsonl", "".join(json.dumps(n) + "\n" for n in lines))
