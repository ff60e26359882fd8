"""What a device package takes on this machine, as tables for a terminal."""

from collections.abc import Sequence

from rich.table import Table

from cooperllm.device.governor import Trial
from cooperllm.device.settings import Settings
from cooperllm.device.trial import ESTIMATE, SLOPES


def settings_table(trials: Sequence[Trial], choice: Trial, budget_mib: float | None) -> Table:
    """Lists what was tried.

    Args:
        trials: From the most frugal to the most generous.
        choice: One of them.
        budget_mib: Memory of the process, or None.

    Returns:
        A table with a row for each, the choice marked.
    """
    table = Table(title="settings, each in a process of its own: MiB at the peak, CPU ms", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("rows", justify="right")
    for name in ("states", "graphs", "weights", "arena"):
        table.add_column(name)
    for name in ("MiB", "query", "estimate"):
        table.add_column(name, justify="right")
    for trial in trials:
        found = trial.findings
        mark = "→" if trial is choice else "over" if budget_mib is not None and found.peak_mib > budget_mib else ""
        times = (f"{1e3 * found.cpu_s(name):.1f}" if found.cpu_s(name) else "-" for name in (SLOPES, ESTIMATE))
        table.add_row(mark, *_cells(trial.settings), f"{found.peak_mib:.0f}", *times)
    return table


def _cells(settings: Settings) -> tuple[str, ...]:
    states = "memory" if settings.states_directory is None else "disk"
    graphs, weights = "all" if settings.keeps_graphs else "phase's", "packed" if settings.packs_weights else "mapped"
    return str(settings.rows_per_pass), states, graphs, weights, "yes" if settings.has_arena else "no"


def phases_table(choice: Trial) -> Table:
    """Lists what the chosen setting takes, phase by phase.

    Args:
        choice: The chosen setting.

    Returns:
        A table with a row for each phase.
    """
    table = Table(title="the chosen settings, phase by phase, MiB", title_justify="left", title_style="bold")
    table.add_column("phase")
    for name in ("peak", "resident after", "dirty", "files", "CPU ms"):
        table.add_column(name, justify="right")
    for phase in choice.findings.phases:
        held = phase.footprint
        numbers = (f"{value:.0f}" for value in (held.peak_mib, held.resident_mib, held.dirty_mib, held.mapped_mib))
        table.add_row(phase.name, *numbers, f"{1e3 * phase.cpu_s:.1f}" if phase.cpu_s else "-")
    return table


def words(choice: Trial, budget_mib: float | None) -> str:
    """Sums up a choice.

    Args:
        choice: The chosen setting.
        budget_mib: Memory of the process, or None.

    Returns:
        Some sentences.
    """
    found = choice.findings
    budget = "without a limit" if budget_mib is None else f"for {budget_mib:g} MiB"
    sentences = [
        f"Chosen {budget}: {', '.join(choice.settings.words)}; {found.peak_mib:.0f} MiB at the peak, imports included.",
        f"A two-point query on {found.num_tokens} tokens runs at {found.query_gflops:.0f} billion operations a second, counting products "
        f"with frozen weights alone; NumPy's float32 product reaches {found.gflops:.0f} here.",
    ]
    if choice.settings.states_directory is not None and not found.is_on_disk:
        sentences.append(
            "Not all of the prefix's states found room on disk; the others are computed whenever they are needed: free some space, or give "
            "another --cache-directory or a larger --cache-mib."
        )
    if not found.resets_peaks:
        sentences.append("This system does not let a peak begin anew: a phase's peak holds those before it.")
    return "\n".join(sentences)
