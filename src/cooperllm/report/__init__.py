"""What a run is shown as: a table for the terminal, four plots, and one page that stands alone.

Every function takes a summary, the content of a run's summary.json, and changes nothing in it.
"""

from cooperllm.report.page import verdict, write_page
from cooperllm.report.plots import write_plots
from cooperllm.report.spread import arms_table

__all__ = ["arms_table", "verdict", "write_page", "write_plots"]
