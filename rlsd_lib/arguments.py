"""The words of the `rlsd` command: its sub-commands and their options; `__main__` does the work."""

import argparse
from pathlib import Path

DESCRIPTION = "Run a notebook or a suite, read runs back as a table, measure and plan the cost."


def parser() -> argparse.ArgumentParser:
    """The parser; `command` of what it returns is the command's name."""
    words = argparse.ArgumentParser(prog="rlsd", description=DESCRIPTION)
    commands = words.add_subparsers(required=True, metavar="COMMAND", dest="command")

    run = commands.add_parser("run", help="run one notebook in a run directory of its own")
    run.add_argument("notebook", help='a path, or a name such as "15_rlsd"')
    _add_parameters(run)
    run.add_argument("--num-processes", type=int, metavar="N", help="as -p num_processes=N")
    run.add_argument(
        "--accelerate",
        metavar="CONFIG",
        help="multi_gpu, multi_cpu, fsdp2, zero3, or a file; default: the preset's, else by hardware",
    )
    run.add_argument("--run-dir", default="", help="default: from the notebook and its parameters")
    run.add_argument(
        "--if-exists",
        choices=("skip", "raise", "overwrite", "resume"),
        default="raise",
        help="skip: keep a finished run, make an unfinished one again (default: raise)",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="resolve and check it, and say what it would do"
    )

    suite = commands.add_parser("suite", help="run a named set of runs; finished ones are kept")
    suite.add_argument("name")
    _add_parameters(suite)
    suite.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: 1, on slurm all)"
    )
    suite.add_argument("--list", action="store_true", help="show how each run stands; run nothing")
    suite.add_argument("--retry-failed", action="store_true", help="make failed runs again")
    suite.add_argument(
        "--resume", action="store_true", help="go on with unfinished runs from their checkpoints"
    )
    suite.add_argument(
        "--submitit", choices=("slurm", "local"), help="hand the runs to a cluster through submitit"
    )
    suite.add_argument(
        "--submitit-options",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what submitit asks the cluster for: timeout_min, gpus_per_node, slurm_partition, ...",
    )

    table = commands.add_parser("table", help="a table with intervals over run directories")
    table.add_argument("folder", nargs="*", help="one or several (default: all outputs)")
    table.add_argument(
        "--against", metavar="METHOD", help="differences from this method, seed by seed, paired"
    )
    table.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    table.add_argument("--paths", action="store_true", help="list notebooks and figures as well")

    report = commands.add_parser("report", help="one page with a suite's tables and figures")
    report.add_argument("suite", help="a suite that was run, or a folder of runs")

    plan = commands.add_parser("plan", help="memory and cost of a preset on GPUs, by arithmetic")
    plan.add_argument("--preset", required=True)
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs per node")
    plan.add_argument("--nodes", type=int, default=1, metavar="N")
    plan.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of one GPU")
    plan.add_argument(
        "--measured",
        type=Path,
        metavar="CSV",
        help="speeds of `rlsd bench --gpu` (default: outputs/tables/bench_gpu.csv, if it is there)",
    )
    plan.add_argument("--sharding", default="", help="ddp, fsdp2 or zero3 (default: the preset's)")
    _add_parameters(plan, "a setting or speed, such as max_completion_length or mfu")

    bench = commands.add_parser("bench", help="step time and memory of RLSD beside GRPO, as ratios")
    bench.add_argument("--preset", default="lab")
    bench.add_argument("--steps", type=int, default=10, help="timed steps per round")
    bench.add_argument("--rounds", type=int, default=3, help="times that both are measured in turn")
    bench.add_argument(
        "--against",
        nargs="*",
        metavar="TRAINER",
        help="instead of a preset: trainers, TRL's too, on synthetic rollouts (default: all)",
    )
    bench.add_argument("--sweep", action="store_true", help="--against, one size at a time")
    bench.add_argument(
        "--gpu", action="store_true", help="models of real size on a GPU, beside what plans say"
    )
    bench.add_argument(
        "--profile", action="store_true", help="where the teacher pass spends its time, and a trace"
    )
    bench.add_argument(
        "--record", action="store_true", help="add the result to outputs/tables/machines"
    )
    _add_parameters(bench, "a size of the synthetic rollouts, such as prompt=1024")
    return words


def _add_parameters(
    parser: argparse.ArgumentParser, what: str = "a parameter of the notebook"
) -> None:
    parser.add_argument(
        "-p",
        dest="pairs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"{what}; again for more",
    )
