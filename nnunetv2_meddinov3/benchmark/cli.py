"""``meddinov3 benchmark plan|run|collect``: comparisons of the paper, and one's own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_meddinov3.errors import UserError

if TYPE_CHECKING:
    from nnunetv2_meddinov3.benchmark.recipe import Recipe

_DESCRIPTION = """\
A recipe lists datasets, methods, folds, seeds and budgets. `plan` prints every command of nnU-Net's
with the hours and the disk space it may take; `run` runs what is not done yet, here or as a SLURM
array; `collect` writes the tables and the report of what is done. Shipped recipes: the paper's
table1, table2 and table3. Needs the extra "benchmark".
"""


def main(argv: list[str] | None = None) -> int:
    """Plan, run or collect.

    Args:
        argv: What was typed after ``meddinov3 benchmark``; by default that of this process.

    Returns:
        The exit code: 0, or 1 if a job failed.

    Raises:
        UserError: If the recipe is wrong or something cannot be read or written.
    """
    arguments = _parser().parse_args(argv)
    # Imported here because `--help` need not wait for pydantic and numpy.
    from nnunetv2_meddinov3.benchmark.recipe import load_recipe

    recipe = load_recipe(arguments.recipe)
    if arguments.verb == "plan":
        return _plan(recipe, arguments)
    if arguments.verb == "collect":
        return _collect(recipe, arguments)
    return _run(recipe, arguments)


def _plan(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from nnunetv2_meddinov3.benchmark.planned import plan_lines

    print("\n".join(plan_lines(recipe, arguments.output, arguments.device)))
    return 0


def _run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from nnunetv2_meddinov3.benchmark import running
    from nnunetv2_meddinov3.benchmark.jobs import jobs
    from nnunetv2_meddinov3.benchmark.slurm import write_scripts
    from nnunetv2_meddinov3.files import check_writable

    count = len(jobs(recipe))
    if arguments.job is not None and not 0 <= arguments.job < count:
        raise UserError(f"--job must be from 0 to {count - 1}, got {arguments.job}.")
    if arguments.parallel < 1:
        raise UserError(f"--parallel must be at least 1, got {arguments.parallel}.")
    running.check_folders()
    check_writable(arguments.output)
    if arguments.slurm:
        name = arguments.recipe
        name = str(Path(name).resolve()) if Path(name).is_file() else name
        prepare, train = write_scripts(recipe, name, arguments.output, count, arguments.device)
        print(f"id=$(sbatch --parsable {prepare})\nsbatch --dependency=afterok:$id {train}")
        return 0
    if arguments.job is None:
        running.prepare(recipe, arguments.output, sys.stderr)
    if arguments.prepare:
        return 0
    failures = running.run(
        recipe,
        arguments.output,
        only=None if arguments.job is None else [arguments.job],
        slots=_slots(arguments),
        device=arguments.device,
        retry=arguments.retry,
        stream=sys.stderr,
    )
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        print(f"Failed jobs: {len(failures)}. --retry runs them again.", file=sys.stderr)
    return 1 if failures else 0


def _slots(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Return the variables of each place for a job: a GPU each, or a share of the cores."""
    if arguments.gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in arguments.gpus.split(",")]
    if arguments.parallel == 1:
        return [{}]
    import os

    threads = str(max(1, (os.cpu_count() or 1) // arguments.parallel))
    alone = {"OMP_NUM_THREADS": threads, "nnUNet_n_proc_DA": "0"}
    return [alone for _ in range(arguments.parallel)]


def _collect(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from nnunetv2_meddinov3.benchmark.comparison_report import write_comparison
    from nnunetv2_meddinov3.benchmark.jobs import jobs
    from nnunetv2_meddinov3.benchmark.results import gather, read_results, write_results

    if arguments.results is not None:
        results, folder = read_results(arguments.results), arguments.results
    else:
        results, folder = gather(recipe, arguments.output), arguments.output / "results"
        write_results(folder, results)
    report = arguments.output / "report.html"
    (arguments.output / "figures").mkdir(parents=True, exist_ok=True)
    write_comparison(report, recipe, results)
    print(f"{len(results.runs)} of {len(jobs(recipe))} jobs are done.")
    print(f"Written: {report}; its numbers are in {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 benchmark",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="plan|run|collect")
    parts = {
        "plan": "print all commands and what they take",
        "run": "run what is not done yet",
        "collect": "write tables and the report of what is done",
    }
    found = {}
    for verb, what in parts.items():
        found[verb] = verbs.add_parser(verb, help=what, description=what.capitalize())
        found[verb].add_argument("recipe", metavar="RECIPE", help="a shipped name, or a YAML file")
        found[verb].add_argument(
            "-o",
            dest="output",
            type=Path,
            default=Path("benchmark"),
            metavar="DIR",
            help="of the results. Default: benchmark",
        )
    for verb in ("plan", "run"):
        found[verb].add_argument(
            "-device", choices=("cuda", "cpu", "mps"), default="cuda", help="Default: cuda"
        )
    add = found["run"].add_argument
    add("--prepare", action="store_true", help="plan and preprocess, and train nothing")
    add("--job", type=int, metavar="N", help="run this job of `plan` alone")
    add("--gpus", metavar="0,1", help="run one job at a time on each of these GPUs")
    add("--parallel", type=int, default=1, metavar="N", help="jobs at a time, sharing the cores")
    add("--retry", action="store_true", help="run jobs that failed before again")
    add("--slurm", action="store_true", help="write SLURM scripts and print how to submit them")
    found["collect"].add_argument(
        "--results", type=Path, metavar="DIR", help="a folder with cases.csv and runs.csv instead"
    )
    return parser
