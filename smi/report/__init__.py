"""Pictures, and the page that shows a run: `smi report`."""

from .command import write_report
from .pictures import picture_grid, rows_of

__all__ = ["picture_grid", "rows_of", "write_report"]
