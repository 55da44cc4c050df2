"""What every way of taking refusals out does to one model, side by side, measured by one evaluator from saved files.

    python benchmarks/results.py MODEL DIR --seeds 0,1,2 --trials 20
    python benchmarks/results.py MODEL DIR --only heretic --also heretic=SAVED --heretic-log heretic=result.json
    python benchmarks/results.py MODEL DIR --judge-again
    python benchmarks/results.py --page benchmarks/records/* -o docs/results.md

The variants are `base`; `run` with its defaults, once for each seed; `classic`, the recipe of the seed scripts;
`projected`, the one that people use by hand; `layer`, by `--select layer`; `tpe`, the yardstick of `tpe.py`; and
directories that other tools have saved (`--also`). Each is made in a process of its own and measured in another, so
that seconds and peak memory are its own. DIR gets one record for each, `NAME.json`, with counts and the ids of prompts
alone; answers stay in DIR/private. What is there is not made again, so a killed call goes on when it is repeated.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remove_refusals.errors import RemoveRefusalsError
from remove_refusals.files import atomic_file, write_json

BASE, RUN = "base", "run"
OWN = ("classic", "projected", "layer", "tpe")
"""What is made here beside `run`, with the first of the seeds."""

TESTS = ("harmful-test", "harmless-test", "alarming-test")
ASKED = (
    *"model dtype measure_dtype device n_test max_new_tokens kl_tokens".split(),
    *(name.replace("-", "_") for name in TESTS),
)
"""The options that all variants of a directory share."""


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `arguments` keeps it for the processes to be started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory, a hub id, or demo")
    parser.add_argument("directory", nargs="?", type=Path, help="where records, answers and models go")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these variants alone: run,run-1,classic,…")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=200, help="of tpe")
    parser.add_argument("--deadline", type=float, help="seconds after which no trial of tpe begins")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=DIR", help="what another tool saved")
    parser.add_argument("--heretic-log", action="append", default=[], metavar="NAME=FILE", help="its driver's result")
    parser.add_argument("--dtype", default="auto", help="that variants are made in")
    parser.add_argument("--measure-dtype", help="that they are measured in; by default the same")
    parser.add_argument("--device")
    parser.add_argument("--batch-size", type=int)
    for name in ("harmful", "harmless", *TESTS):
        parser.add_argument(f"--{name}", help="a file of prompts; by default the embedded set")
    parser.add_argument("--n-test", type=int, help="at most so many prompts of each test set")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--kl-tokens", type=int, default=32)
    parser.add_argument("--judge", default="phrases")
    parser.add_argument("--judge-again", action="store_true", help="label the answers that are there anew")
    parser.add_argument("--tasks", default="", help="tasks of lm-evaluation-harness, by comma")
    parser.add_argument("--task-files", help="a directory with task files")
    parser.add_argument("--task-limit", type=int)
    parser.add_argument("--why", default="", help="a sentence for the record: why less was measured than by default")
    parser.add_argument("--keep", action="store_true", help="keep the edited models")
    parser.add_argument("--page", nargs="+", type=Path, metavar="RECORDS", help="directories of records to write up")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--stage", choices=("make", "answer"), help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not options.page and options.directory is None:
        parser.error("give a model and a directory, or --page with records")
    for option in ("also", "heretic_log"):
        pairs = [part.partition("=") for part in getattr(options, option)]
        if not all(name.isidentifier() and value for name, _, value in pairs):
            parser.error(f"--{option.replace('_', '-')} takes NAME=PATH, the name of letters, digits and _")
        setattr(options, option, {name: Path(value) for name, _, value in pairs})
    wrong = set(options.only or ()) - {RUN, *names(options)}
    if options.directory is not None and wrong:
        parser.error(f"--only names {', '.join(sorted(wrong))}; there are {RUN}, {', '.join(names(options))}")
    return options


def names(options: argparse.Namespace) -> list[str]:
    """Name every variant that the options know."""
    return [BASE, *(f"{RUN}-{seed}" for seed in options.seeds), *OWN, *options.also]


def chosen(options: argparse.Namespace) -> list[str]:
    """Name the variants to be measured, the base first, which all others need."""
    only = options.only or names(options)
    return [name for name in names(options) if name in {BASE, *only} or (RUN in only and name.startswith(f"{RUN}-"))]


def seed_of(name: str, options: argparse.Namespace) -> int:
    """Give the seed that a variant is made with."""
    return int(name.removeprefix(f"{RUN}-")) if name.startswith(f"{RUN}-") else int(options.seeds[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the variants, do one stage of one of them, or write the page."""
    options = parsed(arguments)
    try:
        if options.page:
            import results_page

            results_page.write(options.page, options.output)
        elif options.stage:
            write_json(part_file(options), run_stage(options), force=True)
        else:
            sys.exit(measure(options))
    except RemoveRefusalsError as error:
        sys.exit(str(error))


def run_stage(options: argparse.Namespace) -> dict[str, Any]:
    """Do one stage of one variant in this process."""
    import results_stages

    stage: dict[str, Any] = getattr(results_stages, options.stage)(options, options.variant)
    return stage


def measure(options: argparse.Namespace) -> int:
    """Make and measure what is not there yet; give the number of variants that failed."""
    private = options.directory / "private"
    private.mkdir(parents=True, exist_ok=True)
    asked = {name: str(getattr(options, name)) for name in ASKED}
    before = private / "asked.json"
    if before.exists() and (kept := json.loads(before.read_text())) != asked:
        different = [name for name in ASKED if kept.get(name) != asked[name]]
        sys.exit(f"{options.directory} was measured with another {', '.join(different)}; choose another directory.")
    write_json(before, asked, force=True)
    failed = 0
    for name in chosen(options):
        record = options.directory / f"{name}.json"
        if record.exists() and not options.judge_again:
            print(f"{name}: is there", flush=True)
            continue
        if options.judge_again and not (private / f"{name}.answer.json").exists():
            continue
        started = time.monotonic()
        try:
            write_record(record, recorded(options, name))
        except subprocess.CalledProcessError as error:
            # The process has said why; the others can be measured all the same.
            print(f"{name}: failed in the stage {error.cmd}", flush=True)
            failed += 1
            if name == BASE:
                break
            continue
        if not options.keep:
            shutil.rmtree(options.directory / "models" / name, ignore_errors=True)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    if (options.directory / f"{BASE}.json").exists():
        import results_page

        print(results_page.page(*results_page.read([options.directory])))
    return failed


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record that may be committed: a line for each of its parts."""
    lines = (f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False)}" for name, part in record.items())
    with atomic_file(path, force=True) as staging:
        staging.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")


def recorded(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Go through a variant's stages and put its record together."""
    made = staged(options, "make", name) if name not in (BASE, *options.also) else None
    answered = staged(options, "answer", name)
    record = answered["record"]
    if options.judge_again:
        import results_stages

        record = results_stages.scored(options, name, answered)
    more = {"made": made} if made is not None else {}
    return record | more | {"measured": answered["cost"]}


def staged(options: argparse.Namespace, stage: str, name: str) -> dict[str, Any]:
    """Give what a stage found and took, from its file if it is there."""
    path = options.directory / "private" / f"{name}.{stage}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    found, cost = spawned(options, stage, name)
    # What the stage itself measured of its cost, such as the memory of a GPU, stands beside.
    found["cost"] = cost | found.get("cost", {})
    write_json(path, found, force=True)
    return found


def spawned(options: argparse.Namespace, stage: str, name: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Run a stage in a process of its own; give what it found, and what the process took."""
    part = part_file(options, stage, name)
    part.unlink(missing_ok=True)
    started = time.monotonic()
    command = [sys.executable, __file__, *options.arguments, "--stage", stage, "--variant", name]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, stage)
    found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    part.unlink()
    per_unit = 1 if sys.platform == "darwin" else 1024
    cost = {
        "wall_s": time.monotonic() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_memory": usage.ru_maxrss * per_unit,
    }
    return found, cost


def part_file(options: argparse.Namespace, stage: str | None = None, name: str | None = None) -> Path:
    """Say where a stage's process leaves what it found, until what it took is known too."""
    found: Path = options.directory / "private" / f"{name or options.variant}.{stage or options.stage}.part"
    return found


if __name__ == "__main__":
    main()
