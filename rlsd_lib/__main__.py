"""The `rlsd` command: run a notebook or a suite, read runs back as a table, measure the cost.

A command is a function from its options to the exit status. It imports what it needs by itself, so
that a typing mistake costs no second.
"""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlsd_lib import WORKBOOK, __version__
from rlsd_lib.names import look_up
from rlsd_lib.runs import Interrupted, NotebookError
from rlsd_lib.runs.parameters import (
    as_text,
    complete,
    edited_defaults,
    parse_pairs,
    read_parameters,
)
from rlsd_lib.runs.paths import REPOSITORY, default_run_dir, find_notebook, outputs_root

if TYPE_CHECKING:
    from rlsd_lib.runs.suites import Job, Outcome

MACHINES = Path("tables", "machines")  # in the outputs: what was run on which machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0, 1 (a run failed), 2 (bad input), 130 (stopped by ctrl-C or a SIGTERM, and can go on) or 141
    (nobody reads what is printed).
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options = parser().parse_args(words)
        status = options.command(options)
        sys.stdout.flush()
        return status
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        _complain(f"rlsd: {error}")
        return 2
    except ModuleNotFoundError as error:
        _complain(f"rlsd: {error}. {WORKBOOK}")
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        why = f": {error}" if str(error) else ""
        again = _again(words, options.resume_with)
        _complain(f"\nrlsd: interrupted{why}\ngo on with\n  {again}")
        return 130
    except NotebookError as error:  # in a line: the traceback is in the notebook
        _complain(f"rlsd: failed: {error}")
        return 1
    except BrokenPipeError:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            raise  # another pipe than ours
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _again(words: Sequence[str], resume: str) -> str:
    """The command line that goes on where `words` stopped; of an --if-exists the last one counts."""
    line = re.sub(r" --if-exists[ =](?!resume)\S+", "", shlex.join(["rlsd", *words]))
    return line if resume in line.replace("=", " ") else f"{line} {resume}"


def _complain(text: str) -> None:
    """Write to stderr, on a terminal in lines that fit."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        whole = {"break_long_words": False, "break_on_hyphens": False}  # paths
        text = "\n".join(textwrap.fill(line, width, **whole) for line in text.split("\n"))
    print(text, file=sys.stderr)


def _run(options: argparse.Namespace) -> int:
    """Run one notebook in a run directory of its own.

    rlsd run 15_rlsd -p preset=smoke
    rlsd run 15_rlsd -p seed=1 -p overrides='{"epsilon_w": 0.5}'
    """
    from rlsd_lib.runs.follow import followed
    from rlsd_lib.runs.records import state_of

    source = find_notebook(options.notebook)
    count = options.num_processes
    pairs = options.pairs if count is None else [*options.pairs, f"num_processes={count}"]
    given = parse_pairs(pairs, read_parameters(source))
    full = complete(source, given)
    _say_edits(source, given)
    if options.accelerate:
        os.environ["RLSD_ACCELERATE"] = options.accelerate  # read by `launch`, in the kernel
    if options.dry_run:
        # Before the import: the libraries read these when they are imported.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        from rlsd_lib.experiment.preflight import dry_run

        found = dry_run(options.notebook, full)
        print(found.text())
        return 2 if found.wrong else 0
    folder = Path(options.run_dir or default_run_dir(source.stem, full)).resolve()
    mode = options.if_exists
    if mode == "skip":
        if state_of(folder) == "finished":
            print(f"{folder}: finished already, kept")
            return 0
        mode = "overwrite"
    _check([full])
    from rlsd_lib.runs.execute import execute_notebook  # a second to import

    print(f"{source.name} -> {folder}", flush=True)
    begun = time.monotonic()
    with followed([folder]):
        execute_notebook(source, given, run_dir=folder, if_exists=mode)
    print(f"finished in {_clock(time.monotonic() - begun)}{_accuracies(folder)}")
    print(f"lies in  {folder}")
    print(f"open     {source.name} there, or: rlsd table {_short(folder.parent)}")
    return 0


def _check(runs: Sequence[Mapping[str, Any]]) -> None:
    """Judge training runs before anything exists, and say what of them changes nothing."""
    from rlsd_lib.experiment.judged import judged

    for line in judged(runs):
        print(f"note: {line}", flush=True)


def _accuracies(folder: Path) -> str:
    """Accuracy before and after with 95 % intervals, where a run has them."""
    from rlsd_lib.measure.intervals import Interval

    file, said = folder / "metrics.json", ""
    metrics = json.loads(file.read_text()) if file.exists() else {}
    for when in ("before", "after"):
        ends = [metrics.get(f"accuracy_{when}{end}", math.nan) for end in ("", "_low", "_high")]
        said += f", {Interval(*ends):.2f} {when}" if f"accuracy_{when}" in metrics else ""
    return said.replace(",", ", accuracy", 1)


def _short(path: Path) -> Path:
    """A path as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _say_edits(source: Path, given: Mapping[str, Any]) -> None:
    """Say which defaults of a notebook decide this run and are not those that were committed."""
    edits = {k: pair for k, pair in edited_defaults(source).items() if k not in given}
    for name, (committed, now) in edits.items():
        print(f"{source.name}: {name}={now!r} by its parameters cell, committed: {committed!r}")


def _suite(options: argparse.Namespace) -> int:
    """Run a named set of runs; finished ones are kept.

    rlsd suite demo --jobs 2
    rlsd suite paper --list
    """
    from tqdm import tqdm

    from rlsd_lib.runs.follow import followed
    from rlsd_lib.runs.processes import on_sigterm, terminate_children
    from rlsd_lib.runs.suites import SUITES, jobs_of, record_plan, settle

    changes = parse_pairs(options.pairs)
    jobs = jobs_of(options.name, changes)
    print(textwrap.fill(f"{options.name}: {SUITES[options.name].purpose}", 79))
    first = {job.notebook: job.parameters for job in jobs}
    for notebook, given in first.items():
        _say_edits(find_notebook(notebook), given)
    if changes:  # a suite as it stands is known to resolve
        _check([complete(find_notebook(job.notebook), job.parameters) for job in jobs])
    if options.jobs is None:
        options.jobs = len(jobs) if options.submitit == "slurm" else 1
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: expected 1 or more")
    settled, rest = settle(jobs, options.retry_failed)
    states = {job.run_dir: job.state() for job in jobs}
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states.values()).items())
    print(f"{len(jobs)} runs: {counts}", flush=True)
    if options.list:
        print("\n".join(f"{state:11} {run_dir}" for run_dir, state in states.items()))
        return 0
    outcomes = _outcomes(options, rest)  # judges the options before anything is written
    record_plan(options.name, changes, jobs)
    missing: list[Outcome] = []
    took: list[float] = []

    def leave() -> None:  # start nothing more; what runs may still save and stop
        terminate_children()
        print("\nstopping; runs in training save a checkpoint first", file=sys.stderr)
        raise KeyboardInterrupt

    folders = [job.run_dir for job in rest]
    with on_sigterm(leave), on_sigterm(leave, signal.SIGINT), followed(folders):
        for count, outcome in enumerate(chain(settled, outcomes), 1):
            line = f"[{count}/{len(jobs)}] {outcome.job.run_dir.name}: {outcome.status}"
            if outcome.seconds:
                took.append(outcome.seconds)
                rounds = math.ceil((len(jobs) - count) / options.jobs)
                line += f" in {_clock(outcome.seconds)}"
                line += f", about {_clock(rounds * fmean(took))} left" if rounds else ""
            tqdm.write(line)  # above the bars
            missing += [outcome] if outcome.status not in ("done", "kept") else []
    for outcome in missing:
        print(f"{outcome.status}: {outcome.job.run_dir}\n{outcome.error}", file=sys.stderr)
    if any(outcome.status == "failed before" for outcome in missing):
        print("failed before: --retry-failed makes them again", file=sys.stderr)
    folder = _short(jobs[0].run_dir.parent)
    print(f"lies in  {folder}\nopen     rlsd table {folder}, or: rlsd report {options.name}")
    return 1 if missing else 0


def _outcomes(options: argparse.Namespace, jobs: "Sequence[Job]") -> "Iterator[Outcome]":
    """The runs as they end, made here or on a cluster."""
    given = parse_pairs(options.submitit_options)
    if given and not options.submitit:
        raise ValueError("--submitit-options: only with --submitit")
    mode = "resume" if options.resume else "skip"
    if options.submitit:
        from rlsd_lib.experiment.cluster import run_submitted

        return run_submitted(jobs, options.jobs, options.submitit, given, mode)
    from rlsd_lib.runs.suites import run_jobs

    return run_jobs(jobs, options.jobs, mode)


def _list(options: argparse.Namespace) -> int:
    """List notebooks with their parameters, presets, suites, methods and controls.

    rlsd list
    rlsd list | grep lab
    """
    from rlsd_lib.experiment.controls import CONTROLS
    from rlsd_lib.experiment.presets import PRESETS
    from rlsd_lib.methods import METHODS
    from rlsd_lib.runs.suites import SUITES

    files = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    declared = {file.stem: read_parameters(file).values() for file in files}
    parts = {
        "notebooks, rlsd run NAME -p PARAMETER=VALUE": {
            name: ", ".join(f"{p.name}={as_text(p.default)}" for p in parameters)
            for name, parameters in declared.items()
        },
        "suites, rlsd suite NAME": {name: suite.purpose for name, suite in SUITES.items()},
        "presets, -p preset=NAME": {name: preset.summary for name, preset in PRESETS.items()},
        "methods, -p method=NAME": {name: row.summary for name, row in METHODS.items()},
        "controls, -p control=NAME: what the teacher reads": CONTROLS,
    }
    indent = {"initial_indent": "  ", "subsequent_indent": " " * 23}
    for title, entries in parts.items():
        print(f"{title}\n")
        for name, said in entries.items():
            print(textwrap.fill(f"{name:<20} {said}", 79, **indent))
        print()
    return 0


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _table(options: argparse.Namespace) -> int:
    """Show run directories as a table with intervals.

    rlsd table outputs/demo
    rlsd table outputs/paper --against grpo --format csv
    """
    if options.machines:
        from rlsd_lib.runs.machines import hardware_table

        print(hardware_table(outputs_root() / MACHINES))
        return 0
    from rlsd_lib.report.tables import make_table, numbers, paired_differences, together
    from rlsd_lib.runs.records import read_runs

    runs = together(*map(read_runs, options.folder or [outputs_root()]))
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    if options.learned:
        from rlsd_lib.report.learned import learned, to_open

        print(learned(runs, options.against or "grpo").fitted(min(width, 78)))
        print("\nTo open:\n" + "\n".join(str(_short(path)) for path in to_open(runs)))
        return 0
    if options.paper:
        from rlsd_lib.report.paper_tables import compare

        table = compare(runs, options.paper)
    else:
        table = paired_differences(runs, options.against) if options.against else make_table(runs)
    if options.format == "csv":
        plain = not (options.paper or options.against)
        print((numbers(runs) if plain else table.rows).to_csv(index=False), end="")
        return 0
    print(table.markdown() if options.all else table.fitted(width))
    for path in runs.runs["path"] if options.paths and not runs.runs.empty else ():
        files = [*Path(path).glob("*.ipynb"), *sorted(Path(path).glob("figures/*"))]
        print("\n" + "\n".join(str(file) for file in files))
    return 0


def _headroom(options: argparse.Namespace) -> int:
    """Show who learns faster, by how many rollouts, over labs.

    rlsd headroom outputs/paper outputs/credits --preset lab-credit
    rlsd headroom outputs/rates --rates
    """
    from rlsd_lib.report.headroom import best_rates, compared
    from rlsd_lib.report.tables import together
    from rlsd_lib.runs.records import read_runs

    folders = options.folder or [outputs_root() / ("rates" if options.rates else "paper")]
    runs = together(*(read_runs(folder) for folder in folders))
    if options.rates:
        print(best_rates(runs).to_string(index=False))
        return 0
    found = sorted(runs.runs["preset"].dropna().unique()) if len(runs.runs) else []
    for preset in [options.preset] if options.preset else found:
        table = compared(runs.of_preset(preset), options.against)
        print(f"{preset}\n\n{table.markdown()}\n")
    return 0


def _report(options: argparse.Namespace) -> int:
    """Write one page with a suite's tables and figures.

    rlsd report demo
    rlsd report outputs/paper
    """
    from rlsd_lib.report.page import write_report

    page = write_report(options.suite)
    print(f"{page}\nopen it in a browser; its figures and tables lie beside it")
    return 0


def _site(options: argparse.Namespace) -> int:
    """Write every notebook that was run as a static page, from finished runs.

    rlsd site
    """
    from rlsd_lib.report.page import write_site

    print(f"{write_site()}\nopen it in a browser; the folder can be published as it is")
    return 0


def _bench(options: argparse.Namespace) -> int:
    """Measure step time and memory of RLSD beside GRPO, as ratios.

    rlsd bench --preset smoke --steps 5
    rlsd bench --against GRPO RLSD "TRL SDPO" cepo -p prompt=512
    """
    from functools import partial

    from rlsd_lib.experiment import bench
    from rlsd_lib.experiment.bench import BASE, Sizes, contenders, preset_trainer
    from rlsd_lib.methods import METHODS
    from rlsd_lib.runs.machines import machine_name, record

    synthetic = options.against is not None
    if options.pairs and not (synthetic or options.profile):
        raise ValueError(
            f"-p {options.pairs[0]}: a size of synthetic rollouts means nothing here; add "
            "--against or --profile"
        )
    given = parse_pairs(options.pairs)
    known = [field.name for field in dataclasses.fields(Sizes)]
    sizes = Sizes(**{look_up(name, known, "size"): value for name, value in given.items()})
    if options.profile:
        trace = outputs_root() / "profiles" / "teacher_pass.json"
        print(bench.profile_teacher_pass(sizes, trace))
        return 0
    measured: Iterable[tuple[str, Any]]
    if options.gpu:
        models = bench.bench_gpu(outputs_root() / "tables")
        whole = "`rlsd bench --gpu`, {}, generation included"
        measured = ((whole.format(name.split("/")[-1]), table) for name, table in models)
    elif synthetic:
        what = " ".join(["bench --against", *(f"-p {pair}" for pair in options.pairs)])
        clock = "seconds are the processor's where torch has one thread, else the wall clock's"
        print(f"{sizes}\n{machine_name()}; {clock}\n", flush=True)
        names = [look_up(name, contenders(*METHODS), "contender") for name in options.against]
        others = [name for name in names or contenders() if name != BASE]
        table = bench.race(sizes.build, others, options.steps, options.rounds)
        measured = [(f"`rlsd {what}`", table)]
    else:
        build = partial(preset_trainer, options.preset)
        table = bench.race(build, ["RLSD"], options.steps, options.rounds)
        measured = [(f"`rlsd bench --preset {options.preset}`", table)]
    for what, table in measured:  # kept one by one, as they come
        print(table.to_string(float_format="{:.3f}".format), flush=True)
        if options.record:
            print(record(outputs_root() / MACHINES, {what: bench.in_words(table)}), flush=True)
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Say by arithmetic what memory and time a preset takes on GPUs.

    rlsd plan --preset qwen3-vl-8b --gpus 8
    rlsd plan --preset qwen3-text -p max_completion_length=1200
    """
    from rlsd_lib.experiment.plan import FIELDS, describe, plan_of
    from rlsd_lib.experiment.presets import PRESETS

    given = parse_pairs(options.pairs)
    for name in given:
        look_up(name, FIELDS, "setting")
    preset = PRESETS[look_up(options.preset, PRESETS, "preset")]
    plan = plan_of(preset, gpus=options.gpus, **given)
    print(describe(plan, f"{options.preset}: {preset.model}"))
    return 0


class _Parser(argparse.ArgumentParser):
    """Refuses a value that is none of an argument's choices as `look_up` does."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            look_up(value, action.choices, "".join(action.option_strings) or "command")


def parser() -> argparse.ArgumentParser:
    """The sub-commands and their options; `command` of what it parses is the function to call."""
    purpose = "Run a notebook or a suite, read runs back as a table, measure and plan the cost."
    words = _Parser(prog="rlsd", description=purpose)
    words.add_argument("--version", action="version", version=f"rlsd {__version__}")
    commands = words.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, _run)
    run.set_defaults(resume_with="--if-exists resume")
    run.add_argument("notebook", help='a path, or a name such as "15_rlsd"')
    _add_pairs(run, "a parameter of the notebook")
    run.add_argument("--num-processes", type=int, metavar="N", help="as -p num_processes=N")
    run.add_argument("--accelerate", help="multi_gpu, multi_cpu, fsdp2, zero3, or a file")
    run.add_argument("--run-dir", default="", help="default: from the notebook and its parameters")
    modes = ("skip", "raise", "overwrite", "resume", "resume-older")
    kept = "skip: keep a finished run, make an unfinished one again (default: raise)"
    run.add_argument("--if-exists", choices=modes, default="raise", help=kept)
    run.add_argument("--dry-run", action="store_true", help="check it and say what it would do")

    suite = _command(commands, _suite)
    suite.set_defaults(resume_with="--resume")
    suite.add_argument("name")
    _add_pairs(suite, "a parameter of every notebook")
    suite.add_argument("--jobs", type=int, metavar="N", help="at a time (default: 1, on slurm all)")
    suite.add_argument("--list", action="store_true", help="show how each run stands; run nothing")
    suite.add_argument("--retry-failed", action="store_true", help="make failed runs again")
    suite.add_argument("--resume", action="store_true", help="go on from checkpoints")
    suite.add_argument("--submitit", choices=("slurm", "local"), help="run them as cluster jobs")
    asked = "what submitit asks the cluster for, such as timeout_min or gpus_per_node"
    _add_pairs(suite, asked, "--submitit-options")

    table = _command(commands, _table)
    table.add_argument("folder", nargs="*", help="one or several (default: all outputs)")
    table.add_argument("--against", metavar="METHOD", help="paired differences from this method")
    table.add_argument("--paper", metavar="PRESET", help="instead: the paper's Table 2 with ours")
    table.add_argument("--machines", action="store_true", help="instead: what was run on what")
    table.add_argument("--learned", action="store_true", help="instead: what was seen, in short")
    table.add_argument("--all", action="store_true", help="every column, however wide")
    table.add_argument("--format", choices=("text", "csv"), default="text", help="csv: numbers")
    table.add_argument("--paths", action="store_true", help="list notebooks and figures as well")

    headroom = _command(commands, _headroom)
    headroom.add_argument("folder", nargs="*", help="one or several (default: paper or rates)")
    headroom.add_argument("--preset", help="only its runs")
    headroom.add_argument("--against", default="grpo", metavar="ARM", help="whom to compare with")
    headroom.add_argument("--rates", action="store_true", help="instead: each method's best rate")

    report = _command(commands, _report)
    report.add_argument("suite", help="a suite that was run, or a folder of runs")

    _command(commands, _site)

    _command(commands, _list)

    plan = _command(commands, _plan)
    plan.add_argument("--preset", required=True)
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="of all nodes")
    _add_pairs(plan, "a setting or speed, such as max_completion_length, gpu_memory or mfu")

    bench = _command(commands, _bench)
    bench.add_argument("--preset", default="lab")
    bench.add_argument("--steps", type=int, default=10, help="timed steps per round")
    bench.add_argument("--rounds", type=int, default=3, help="times that both are measured in turn")
    others = "trainers, TRL's too, or methods, on synthetic rollouts (default: all trainers)"
    bench.add_argument("--against", nargs="*", metavar="TRAINER", help=others)
    bench.add_argument("--gpu", action="store_true", help="models of real size, beside their plans")
    bench.add_argument("--profile", action="store_true", help="where the teacher pass takes time")
    bench.add_argument("--record", action="store_true", help="add it to outputs/tables/machines")
    _add_pairs(bench, "a size of the synthetic rollouts, such as prompt=1024")
    return words


def _command(commands: Any, function: Callable) -> argparse.ArgumentParser:
    """The sub-command of a function, whose docstring is a sentence and what one may type."""
    sentence, examples = inspect.getdoc(function).split("\n\n")
    parser = commands.add_parser(
        function.__name__.removeprefix("_"),
        help=sentence[0].lower() + sentence[1:-1],
        description=sentence,
        epilog=textwrap.indent(examples, "  ").replace("  ", "examples:\n  ", 1),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function, resume_with="")
    return parser


def _add_pairs(parser: argparse.ArgumentParser, what: str, flag: str = "-p") -> None:
    how = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    dest = "pairs" if flag == "-p" else None
    parser.add_argument(flag, dest=dest, help=f"{what}; again for more", **how)


if __name__ == "__main__":
    sys.exit(main())
