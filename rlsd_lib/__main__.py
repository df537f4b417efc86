"""The `rlsd` command: run a notebook or a suite, read runs back as a table, measure the cost."""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsd_lib.arguments import parser
from rlsd_lib.runs.paths import default_run_dir, find_notebook, outputs_root

if TYPE_CHECKING:
    from rlsd_lib.runs.jobs import Job, Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (a run failed) or 2 (bad input)."""
    options = parser().parse_args(argv)
    try:
        return COMMANDS[options.command](options)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        print(f"rlsd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rlsd: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from rlsd_lib.runs.parameters import check_parameters, read_parameters
    from rlsd_lib.runs.records import state_of

    source = find_notebook(options.notebook)
    declared = read_parameters(source)
    count = options.num_processes
    pairs = [*options.pairs, *([f"num_processes={count}"] if count is not None else [])]
    given = _parse_pairs(pairs, declared)
    if options.accelerate:
        os.environ["RLSD_ACCELERATE"] = options.accelerate  # read by `launch`, in the kernel
    check_parameters(source, declared, given)
    full = {**{p.name: p.default for p in declared.values()}, **given}
    if options.dry_run:
        return _dry_run(source, full)
    chosen = options.run_dir or full.get("run_dir") or default_run_dir(source.stem, full)
    folder = Path(chosen).resolve()
    if options.if_exists == "skip" and state_of(folder) == "finished":
        print(f"{folder}: finished already, kept")
        return 0
    mode = "overwrite" if options.if_exists == "skip" else options.if_exists
    print(f"{source.name} -> {folder}", flush=True)
    return _execute(source, given, folder, mode)


def _dry_run(source: Path, parameters: dict[str, Any]) -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    from rlsd_lib.experiment.dryrun import (
        dry_run,  # only now: the libraries read these when imported
    )
    from rlsd_lib.runs.parameters import unmet

    found = dry_run(source.stem, parameters)
    found.wrong += unmet(source, parameters)
    print(found.text())
    return 2 if found.wrong else 0


def _execute(source: Path, given: dict[str, Any], folder: Path, mode: str) -> int:
    """Run the notebook; what a cell raised is told in a line, its traceback is in the notebook."""
    from rlsd_lib.runs.execute import NotebookError, execute_notebook

    begun = time.monotonic()
    try:
        execute_notebook(source, given, run_dir=folder, if_exists=mode)
    except NotebookError as error:
        print(f"rlsd: failed: {error}", file=sys.stderr)
        return 1
    print(f"finished in {time.monotonic() - begun:.0f} s")
    return 0


def _suite(options: argparse.Namespace) -> int:
    from rlsd_lib.runs.processes import on_sigterm, terminate_children_and_leave
    from rlsd_lib.runs.suites import get_suite, jobs_of, record_plan

    print(f"{options.name}: {get_suite(options.name).purpose}")
    changes = _parse_pairs(options.pairs, {})
    jobs = jobs_of(options.name, changes)
    if changes:  # a suite as it stands is known to resolve
        _resolve(jobs)
    if options.jobs is None:
        options.jobs = len(jobs) if options.submitit == "slurm" else 1
    _say_what_stands(jobs, options)
    if options.list:
        return 0
    outcomes = _outcomes(options, jobs)  # judges the options before anything is written
    record_plan(options.name, changes, jobs)
    missing: list[Outcome] = []
    with on_sigterm(terminate_children_and_leave):
        for count, outcome in enumerate(outcomes, 1):
            took = f" in {_duration(outcome.seconds)}" if outcome.seconds else ""
            left = f", about {_duration(outcome.left)} left" if outcome.left else ""
            name = f"[{count}/{len(jobs)}] {outcome.job.run_dir.name}"
            print(f"{name}: {outcome.status}{took}{left}", flush=True)
            missing += [outcome] if outcome.status not in ("done", "kept") else []
    for outcome in missing:
        print(f"{outcome.status}: {outcome.job.run_dir}\n{outcome.error}", file=sys.stderr)
    if any(outcome.status == "failed before" for outcome in missing):
        print("failed before: --retry-failed makes them again", file=sys.stderr)
    return 1 if missing else 0


def _resolve(jobs: "Sequence[Job]") -> None:
    """Resolve what each run of a suite will train, so that a bad name costs no run."""
    from rlsd_lib.experiment.dryrun import resolve
    from rlsd_lib.runs.parameters import read_parameters

    for job in jobs:
        declared = read_parameters(find_notebook(job.notebook))
        full = {**{p.name: p.default for p in declared.values()}, **job.parameters}
        if "method" in full and "preset" in full:
            resolve(full)


def _outcomes(options: argparse.Namespace, jobs: "Sequence[Job]") -> "Iterator[Outcome]":
    """The runs as they end, made here or on a cluster."""
    from rlsd_lib.runs.jobs import run_jobs

    given = _parse_pairs(options.options, {})
    if given and not options.submitit:
        raise ValueError("--submitit-options: only with --submitit")
    wishes = {
        "retry_failed": options.retry_failed,
        "if_exists": "resume" if options.resume else "skip",
    }
    if not options.submitit:
        return run_jobs(jobs, options.jobs, **wishes)
    from rlsd_lib.experiment.cluster import run_submitted

    return run_submitted(jobs, options.jobs, options.submitit, given, **wishes)


def _say_what_stands(jobs: "Sequence[Job]", options: argparse.Namespace) -> None:
    """How many runs stand how, and what the rest will take if finished ones are a guide."""
    from rlsd_lib.runs.jobs import seconds_taken, time_left

    states = [job.state() for job in jobs]
    if options.list:
        for job, state in zip(jobs, states, strict=True):
            print(f"{state:9} {job.run_dir}")
    open_states = ("to run", "failed") if options.retry_failed else ("to run",)
    rest = [job for job, state in zip(jobs, states, strict=True) if state in open_states]
    left = time_left(rest, seconds_taken(jobs), max(options.jobs, 1))
    about = f"; about {_duration(left)} at {options.jobs} a time" if left else ""
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    print(f"{len(jobs)} runs: {counts}{about}", flush=True)


def _duration(seconds: float) -> str:
    """Seconds for a reader: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _table(options: argparse.Namespace) -> int:
    from rlsd_lib.report.arms import together
    from rlsd_lib.report.tables import make_table, paired_differences
    from rlsd_lib.runs.records import read_runs

    runs = together(*map(read_runs, options.folder or [outputs_root()]))
    table = paired_differences(runs, options.against) if options.against else make_table(runs)
    print(table.csv() if options.format == "csv" else table.markdown())
    for path in runs.runs["path"] if options.paths and not runs.runs.empty else ():
        files = [*Path(path).glob("*.ipynb"), *sorted(Path(path).glob("figures/*"))]
        print("\n" + "\n".join(str(file) for file in files))
    return 0


def _report(options: argparse.Namespace) -> int:
    from rlsd_lib.report.page import write_report
    from rlsd_lib.runs.execute import NotebookError

    try:
        print(write_report(options.suite))
    except NotebookError as error:
        print(f"rlsd: failed: {error}", file=sys.stderr)
        return 1
    return 0


def _bench(options: argparse.Namespace) -> int:
    from rlsd_lib.experiment.bench import clock_in_words, passes, race, sweep
    from rlsd_lib.experiment.racers import PresetTrainers, Sizes, contenders
    from rlsd_lib.names import look_up

    outputs, names = outputs_root(), options.against or list(contenders())
    synthetic = options.against is not None or options.sweep or options.profile
    if options.pairs and not synthetic:
        raise ValueError(
            f"-p {options.pairs[0]}: a size of synthetic rollouts means nothing here; add "
            "--against, --sweep or --profile"
        )
    given = _parse_pairs(options.pairs, {})
    known = [field.name for field in dataclasses.fields(Sizes)]
    sizes = Sizes(**{look_up(name, known, "size"): value for name, value in given.items()})
    if options.profile:
        from rlsd_lib.experiment.profile import profile_teacher_pass

        for part in profile_teacher_pass(sizes, outputs / "profiles" / "teacher_pass.json"):
            print(part, flush=True)
        return 0
    if options.sweep:
        print(sweep(sizes, names, outputs, options.steps).to_csv(index=False))
        return 0
    if options.gpu:
        from rlsd_lib.experiment.gpu import bench_gpu

        what, table = "bench --gpu", bench_gpu(outputs)
    elif synthetic:
        what = " ".join(["bench --against", *(f"-p {pair}" for pair in options.pairs)])
        print(f"{sizes}\n{clock_in_words()}\n")
        print(passes(sizes, options.rounds).map("{:.5g}".format).to_string() + "\n", flush=True)
        table = race(sizes, names, options.steps, options.rounds)
    else:
        what = f"bench --preset {options.preset}"
        table = race(
            PresetTrainers(options.preset), ("GRPO", "RLSD"), options.steps, options.rounds
        )
    print(table.to_string(float_format="{:.3f}".format))
    if options.record:
        from rlsd_lib.experiment.machines import record

        print(record(what, table, outputs / "tables" / "machines"))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rlsd_lib.experiment.plan import FIELDS, describe, plan_of
    from rlsd_lib.experiment.presets import PRESETS
    from rlsd_lib.names import look_up

    given = _parse_pairs(options.pairs, {})
    for name in given:
        look_up(name, FIELDS, "setting")
    gpus = options.gpus * options.nodes
    preset = asdict(PRESETS[look_up(options.preset, PRESETS, "preset")])
    sharding = {"sharding": options.sharding if gpus > 1 else "ddp"} if options.sharding else {}
    changes = {"gpu_memory": options.gpu_memory, **sharding, **given}
    plan = plan_of(preset, gpus=gpus, measured=options.measured, **changes)
    print(describe(plan, f"{options.preset}: {preset['model']}"))
    return 0


def _parse_pairs(pairs: Sequence[str], declared: dict[str, Any]) -> dict[str, Any]:
    """`name=value` words as a dictionary.

    Raises:
        ValueError: a word without "=", or a name that is given twice.
    """
    from rlsd_lib.runs.parameters import parse_value

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"-p {pair}: expected name=value")
        if name in found:
            raise ValueError(f"-p {name}: given twice")
        found[name] = parse_value(text, declared.get(name))
    return found


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "suite": _suite,
    "table": _table,
    "report": _report,
    "plan": _plan,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
