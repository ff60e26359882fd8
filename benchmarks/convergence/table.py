"""Writes the table that people read from the rows that `benchmark.py` has finished: one line per arm, one entry per seed.

python benchmarks/convergence/table.py --work runs/convergence --out benchmarks/results/convergence.md
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark import ROWS

from cooperllm.study import mean_of_last
from cooperllm.summary import rounds_to

UNGUIDED = {
    "sst2": "sentiment-shift-unguided",
    "ag_news": "missing-topics-unguided",
    "customer_reviews": "customer-baseline",
    "banking77": "banking77-baseline",
}
"""Rows with the unguided baseline of each private set: public text plays no part in it."""
PRIVATE = {"sentiment-shift": "sst2", "missing-topics": "ag_news"}
Curves = dict[str, dict[int, list[list[float]]]]


def curves_of(path: Path) -> tuple[Curves, dict[str, float]]:
    """Reads a row: accuracy by round of each arm and seed, and the arms' learning rates."""
    curves: Curves = {}
    rates: dict[str, float] = {}
    for line in json.loads((path / "results.json").read_text(encoding="utf8"))["rows"]:
        if line["is_result"]:
            curves.setdefault(line["arm"], {}).setdefault(line["seed"], []).append([line["round"], line["accuracy"]])
            rates[line["arm"]] = line["learning_rate"]
    return curves, rates


def by_seed(values: Sequence[float | None], form: str = ".3f") -> str:
    """Writes one entry per seed."""
    return " / ".join("-" if value is None else format(value, form) for value in values)


def lines_of(work: Path, row: str) -> list[str]:
    """One line per arm of a row, with its pace against the unguided baseline of the same private set and seed."""
    curves, rates = curves_of(work / row)
    private = ROWS[row].private or PRIVATE[ROWS[row].recipe]
    is_deep = ROWS[row].last_layers is None
    place = work / ("six-layers-baseline" if is_deep else UNGUIDED[private])
    plain = curves_of(place)[0].get("mezo-fl", {}) if (place / "results.json").is_file() else {}
    return [_line(row, arm, rates[arm], seeds, plain) for arm, seeds in curves.items()]


def _line(row: str, arm: str, rate: float, seeds: Mapping[int, list[list[float]]], plain: Mapping[int, list[list[float]]]) -> str:
    ends = [mean_of_last([point for point in curve if point[0] % 10 == 0]) for curve in seeds.values()]
    best = [max(accuracy for _, accuracy in curve) for curve in seeds.values()]
    cells = [row, arm, f"{rate:g}", str(int(max(curve[-1][0] for curve in seeds.values()))), by_seed(ends), by_seed(best)]
    for level in ("end", "best"):
        found = [_pace(curve, plain.get(seed), level) for seed, curve in seeds.items()]
        cells.append(" / ".join(found))
    return f"| {' | '.join(cells)} |"


def _pace(curve: list[list[float]], plain: list[list[float]] | None, level: str) -> str:
    """Rounds to the baseline's level, beside the baseline's own."""
    if plain is None:
        return "-"
    accuracy: Any = mean_of_last(plain) if level == "end" else max(value for _, value in plain)
    own, found = rounds_to(plain, accuracy), rounds_to(curve, accuracy)
    return f"{'never' if found is None else found} ({own})"


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    head = ["row", "arm", "rate", "rounds", "end", "best", "rounds to MeZO-FL's end (its own)", "to its best (its own)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in ROWS:
        if (arguments.work / row / "results.json").is_file():
            lines += lines_of(arguments.work, row)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
