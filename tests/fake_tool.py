"""Stands where the interpreter of the benchmark tools' environment would: it writes their schema.

Called as `python -c ...` it prints a version, as `python -m lmms_eval ...` or `python -m lm_eval
run ...` it writes results and samples under --output_path like that release, and nothing else.
FAKE_TOOL holds JSON: {"version": ..., "shares": {task: {metric: value}}, "questions": {task: n},
"status": 0, "silent": false, "model": null}.
"""

import json
import os
import sys
from pathlib import Path

PLAN = json.loads(os.environ["FAKE_TOOL"])


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def model_name() -> str:
    pairs = dict(pair.split("=", 1) for pair in option("--model_args").split(",") if "=" in pair)
    return PLAN.get("model") or pairs.get("pretrained") or pairs["model"]


def write(tool: str) -> None:
    folder = Path(option("--output_path")) / model_name().replace("/", "__")
    folder.mkdir(parents=True)
    tasks = [task for task in option("--tasks").split(",") if task in PLAN["shares"]]
    counts = {task: {"original": n, "effective": n} for task, n in PLAN["questions"].items()}
    results = {
        "results": {task: {"alias": task, **PLAN["shares"][task]} for task in tasks},
        "versions": dict.fromkeys(tasks, 0.0),
        "n-samples": {task: counts[task] for task in tasks},
        "config": {"model": option("--model"), "model_args": option("--model_args")},
        "task_hashes": {task: f"hash of {task}" for task in tasks},
        "model_name": model_name(),
    }
    date = "2026-11-25T10-00-00"
    lmms = tool == "lmms_eval"
    name = f"{date}_results.json" if lmms else f"results_{date}.json"
    (folder / name).write_text(json.dumps(results))
    for task in tasks:
        line = {"doc_id": 0, "target": "3", "filtered_resps": ["<answer>3</answer>"]}
        for metric in PLAN["shares"][task]:
            plain = metric.split(",")[0]
            line[plain] = {"acc_score": 1} if plain.startswith("wemath") else 1.0
        name = f"{date}_samples_{task}.jsonl" if lmms else f"samples_{task}_{date}.jsonl"
        (folder / name).write_text(json.dumps(line) + "\n")


if sys.argv[1] == "-c":
    sys.stdout.write(PLAN["version"] + "\n")
    sys.exit(0 if PLAN["version"] else 1)
sys.stdout.write(
    "this is what the tool said {USE_LLM_JUDGE} {OPENAI_API_KEY} {MPLBACKEND}\n".format(
        **os.environ
    )
)
if PLAN.get("status"):
    sys.exit(PLAN["status"])
if not PLAN.get("silent"):
    write(sys.argv[2])
