"""Rows of a table that are processes of their own, so that none's memory is another's."""

import json
import statistics
import subprocess
from collections.abc import Sequence


def medians(command: Sequence[str], repeats: int, *told: str) -> dict[str, float]:
    """Runs a command several times, reads the figures on its last line (JSON) and takes their medians; says each where there are words."""
    found = list[dict[str, float]]()
    for _ in range(repeats):
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(process.stdout.splitlines()[-1]))
        if told:
            print(*told, found[-1], flush=True)
    return {figure: statistics.median(each[figure] for each in found) for figure in found[0]}
