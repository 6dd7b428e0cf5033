"""What a run directory tells people: the closing table, the figures, the page.

Reports are made from the files alone, so they can be made again anywhere, at any time.
"""

from fppmo_ray.report.figures import draw_figures
from fppmo_ray.report.page import write_comparison, write_report
from fppmo_ray.report.table import print_result, print_status

__all__ = ["draw_figures", "print_result", "print_status", "write_comparison", "write_report"]
