"""What a person sees while runs are under way: a live line per run in a terminal, plain lines anywhere else."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Lines

from cooperllm.config import ArmName, RunConfig
from cooperllm.desk import News
from cooperllm.messages import StepKind

Key = tuple[ArmName, float, int]


class Progress:
    """Follows runs by their figures, and a comparison by what it tells."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = Lines(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[Key, TaskID] = {}
        self._newest: dict[Key, str] = {}
        self._bytes: dict[Key, int] = {}
        self._overall: TaskID | None = None

    def __enter__(self) -> "Progress":
        self._lines.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the lines as they are."""
        self._lines.stop()

    def observe(self, config: RunConfig, figures: Mapping[str, Any]) -> None:
        """Notes the figures of a round."""
        key = (config.arm.name, config.arm.learning_rate, config.seed)
        name = key[0].value if self._overall is None else f"{key[0].value} {key[1]:g} seed {key[2]}"
        self._bytes[key] = self._bytes.get(key, 0) + figures["bytes_down"] + figures["bytes_up"]
        if figures["accuracy"] is not None:
            self._newest[key] = f"accuracy {figures['accuracy']:.1%}  loss {figures['loss']:.3f}"
        if figures["step"] == StepKind.ROLLBACK.value:
            done = f"{name}  round {figures['round']} is taken back, the run had diverged"
            self._print(f"{done}: it goes on from its best state so far with a step of {figures['learning_rate']:.2g}")
        if self._console.is_terminal:
            if key not in self._tasks:
                self._tasks[key] = self._lines.add_task(f"{name:<11}", total=config.num_rounds, figures="")
            rho = "" if figures["rho"] is None else f"  rho {figures['rho']:+.2f}"
            line = f"{self._newest.get(key, '')}  {self._bytes[key] / 1e6:.1f} MB{rho}"
            self._lines.update(self._tasks[key], completed=figures["round"], figures=line)
        elif figures["accuracy"] is not None:
            self._print(f"{name}  round {figures['round']}/{config.num_rounds}  {self._newest[key]}  {self._bytes[key] / 1e6:.1f} MB")

    def tell(self, news: News) -> None:
        """Notes that a run of a comparison begins, ends, fails or has to wait."""
        if self._overall is None:
            self._overall = self._lines.add_task(f"{'runs':<11}", total=news.num_known, figures="")
        self._lines.update(self._overall, completed=news.num_ended, total=news.num_known)
        if news.ended is not None:
            self._newest.pop(news.ended[:3], None)
            if (task := self._tasks.pop(news.ended[:3], None)) is not None:
                self._lines.remove_task(task)
        if not (self._console.is_terminal and news.ended is None and news.sentence.endswith(": begins")):
            self._print(f"{news.num_ended}/{news.num_known}  {news.sentence}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
