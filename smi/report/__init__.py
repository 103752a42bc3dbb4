"""Pictures, and the page that shows a run: `smi report`."""

from .pictures import picture_grid, rows_of
from .write import write_report

__all__ = ["picture_grid", "rows_of", "write_report"]
