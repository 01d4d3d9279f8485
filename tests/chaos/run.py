"""Random schedules, one after the other, and a table of what came of them: see scripts/chaos."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from harness import RUN_S, WORKERS, Nodes, Outcome, carry_out, draw, nodes, start
from program import DROPOUT, OUTCOME

COLUMNS = ("seed", "what is done", "to the next step", "restarts", "samples once", "same weights", "else")


def row(seed: int, outcome: Outcome) -> str:
    """A line of the table."""
    recovered = "" if outcome.recovered_s is None else f"{outcome.recovered_s:.1f} s"
    restarts = "resumed" if outcome.resumed else outcome.restarts
    yes = {True: "yes", False: "**no**"}
    same = "same curve" if outcome.identical and outcome.schedule.then != WORKERS else yes[outcome.identical]
    wrong = "; ".join(outcome.wrong)
    cells = (seed, outcome.schedule, recovered, restarts, yes[outcome.once], same, wrong)
    return f"| {' | '.join(map(str, cells))} |"


def undisturbed(cluster: Nodes, dropout: float) -> dict[str, Any]:
    """What a run comes to that is not struck."""
    with tempfile.TemporaryDirectory() as folder:
        driver = start(Path(folder), cluster, dropout=dropout)
        assert driver.wait(RUN_S) == 0, "without a blow"
        outcome: dict[str, Any] = torch.load(Path(folder, OUTCOME))
        return outcome


def main() -> None:
    """Exit status 1 if something was lost, counted twice or left behind."""
    parser = argparse.ArgumentParser(description="Kills and stalls what takes part in runs, at random moments.")
    parser.add_argument("--runs", type=int, default=50, help="how many schedules")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow it")
    options = parser.parse_args()
    good = 0
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = tempfile.tempdir = scratch
        with nodes() as cluster:
            expected = {dropout: undisturbed(cluster, dropout) for dropout in (DROPOUT, 0)}
            print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
            for seed in range(options.seed, options.seed + options.runs):
                with tempfile.TemporaryDirectory() as folder:
                    schedule = draw(seed)
                    outcome = carry_out(schedule, Path(folder), cluster, expected[schedule.dropout])
                    print(row(seed, outcome), flush=True)
                    good += outcome.good
    print(f"\n{good} of {options.runs} came to what the run without a blow came to, and left nothing behind.")
    sys.exit(good < options.runs)


if __name__ == "__main__":
    main()
