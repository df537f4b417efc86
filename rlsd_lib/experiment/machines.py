"""A record of what ran on which machine: `rlsd bench --record`, and README's table from the files."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import pandas as pd

from rlsd_lib.runs.provenance import git_state, hardware, package_versions

VERSIONS = ("python", "torch", "trl", "transformers")


def machine_name() -> str:
    """The card, and where there is none the processor."""
    facts = hardware()
    if facts["gpus"]:
        count = len(facts["gpus"])
        return facts["gpus"][0] if count == 1 else f"{count} x {facts['gpus'][0]}"
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {facts['cpu_cores']} cores"


def record(what: str, table: pd.DataFrame, folder: Path) -> Path:
    """Add what was run, and every trainer's step time over GRPO's, to this machine's JSON file.

    `table` is one of `rlsd bench`. Returns the file, in `folder`.
    """
    name, ratios = machine_name(), table[table.columns[table.columns.str.startswith("step / ")]]
    if "trainer" in table:  # several models
        ratios = ratios.set_index(table["model"] + ", " + table["trainer"])
    result = ratios.squeeze(axis=1).dropna().round(3).to_dict() if len(ratios.columns) else {}
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    versions = {package: package_versions()[package] for package in VERSIONS}
    runs = {**known.get("runs", {}), what: {"result": result, **git_state(), **versions}}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": name, "runs": runs}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def hardware_table(folder: Path) -> str:
    """Markdown: what was run on which machine, with results, commit and versions.

    Raises:
        FileNotFoundError: for a folder without records.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} has no records: make one with `rlsd bench --record`")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    columns = {r["machine"]: {w: _cell(run) for w, run in r["runs"].items()} for r in records}
    table = pd.DataFrame(columns).fillna("not run").rename_axis("what")
    lines = [[str(table.index.name), *table.columns], ["---"] * (len(table.columns) + 1)]
    lines += [list(row) for row in table.itertuples()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(run: dict[str, Any]) -> str:
    result = "; ".join(f"{name} {value:.2f}" for name, value in run["result"].items())
    commit = f"{(run['commit'] or 'unknown')[:7]}{' with changes' if run['dirty'] else ''}"
    versions = ", ".join(f"{name} {run[name]}" for name in VERSIONS)
    return f"{result} ({commit}; {versions})"
