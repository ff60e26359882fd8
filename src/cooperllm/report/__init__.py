"""What a run is shown as: a table for the terminal, four plots, and one page that stands alone.

Functions take a summary, the content of a run's summary.json, or for a timeline what a deployment has noted, and change nothing in it.
"""

from cooperllm.report.page import verdict, write_page
from cooperllm.report.plots import write_plots
from cooperllm.report.spread import arms_table
from cooperllm.report.timeline import SHOWN_ROUNDS, times_table, write_timeline

__all__ = ["SHOWN_ROUNDS", "arms_table", "times_table", "verdict", "write_page", "write_plots", "write_timeline"]
