"""Reports of a run directory: the closing table, figures, and an HTML page.

Reports only read the run directory's files, so they can be made again anywhere, at any time.
"""

from fppmo_ray.report.drawings import draw_figures
from fppmo_ray.report.page import write_comparison, write_report
from fppmo_ray.report.table import print_result, print_status

__all__ = ["draw_figures", "print_result", "print_status", "write_comparison", "write_report"]
