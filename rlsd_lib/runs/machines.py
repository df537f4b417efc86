"""What was run on which machine: a small JSON file for each, and the README's table made from them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsd_lib.runs.provenance import git_state, hardware, package_versions
from rlsd_lib.runs.records import write_json

VERSIONS = ("python", "torch", "trl", "transformers", "vllm")


def machine_name() -> str:
    """The card, and where there is none the processor with its cores."""
    facts, info = hardware(), Path("/proc/cpuinfo")
    if facts["gpus"]:
        return facts["gpus"][0]
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else facts['machine']}, {facts['cpu_cores']} cores"


def record(folder: Path, results: Mapping[str, str]) -> Path:
    """Add what was run here, and what came of it in words, to this machine's file in `folder`."""
    machine, versions = machine_name(), package_versions()
    path = folder / (re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + ".json")
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    where = {**git_state(), "packages": {name: versions[name] for name in VERSIONS}}
    rows = {what: {"result": result, **where} for what, result in results.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine, "gpu": bool(hardware()["gpus"]), "rows": known | rows})
    return path


def hardware_table(folder: Path) -> str:
    """Markdown: a row for all that was run anywhere, a column for each machine, one for no GPU."""
    machines: list[dict[str, Any]] = [
        json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))
    ]
    if not any(machine["gpu"] for machine in machines):
        machines.append({"machine": "GPU", "rows": {}})
    lines = [["what", *(machine["machine"] for machine in machines)], ["---"] * (len(machines) + 1)]
    for what in dict.fromkeys(what for machine in machines for what in machine["rows"]):
        found = [machine["rows"].get(what, {"result": "-"}) for machine in machines]
        lines.append([what, *(row["result"] for row in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
