"""Time the command's help against an interpreter that does nothing.

Run: python benchmarks/startup.py [--repeats 7]

The help is to come in under a second. What it takes beyond the bare interpreter is the import of the command-line
packages; PyTorch and Transformers, which take many times as long, must not be among them.
"""

import argparse
import statistics
import subprocess
import sys
import time


def seconds(*arguments: str) -> float:
    """Run the interpreter once and return how long it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Time them in turns and print the medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    ways = {"python -c pass": ("-c", "pass"), "--help": ("-m", "remove_refusals", "--help")}
    # The first round fills the file system's cache and writes the byte code.
    rounds = [{name: seconds(*arguments) for name, arguments in ways.items()} for _ in range(options.repeats + 1)][1:]
    medians = {name: statistics.median(times[name] for times in rounds) for name in ways}
    for name, median in medians.items():
        print(f"{name:<15} {median:6.3f} s")
    print(f"ratio           {medians['--help'] / medians['python -c pass']:6.1f}  (the help expected under 1 s)")


if __name__ == "__main__":
    main()
