"""How a command shows a run: progress while it lasts, then the table and where everything is."""

from collections.abc import Callable

import rich.console
import typer

from cooperllm import pretrained
from cooperllm.progress import Progress
from cooperllm.report import arms_table, verdict
from cooperllm.session import Run


def show(console: rich.console.Console, work: Callable[[Progress], Run], again: str) -> None:
    """Runs something and shows it.

    Args:
        console: Where.
        work: The run or comparison; hands its figures to the progress it is given.
        again: Command that continues it, for whoever has interrupted it.

    Raises:
        typer.Exit: With status 130 after an interruption.
    """
    pretrained.hush()
    with Progress(console) as progress:
        try:
            finished = work(progress)
        except KeyboardInterrupt as interrupt:
            progress.stop()
            console.print(f"interrupted; continue with: {again}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from interrupt
    for notice in finished.summary["notices"]:
        console.print(f"note: {notice}", markup=False, highlight=False)
    console.print(arms_table(finished.summary))
    console.print(verdict(finished.summary), highlight=False)
    console.print(f"report: {(finished.path / 'report.html').resolve()}", highlight=False, soft_wrap=True)
