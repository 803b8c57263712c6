"""Logs, tables and pictures of runs."""

from gradcache_clip.train.report.curves import RunCurve, draw_curves
from gradcache_clip.train.report.metrics_log import MetricsLog, read_log
from gradcache_clip.train.report.table import RunFigures, format_bytes, metrics_table, to_markdown

__all__ = [
    "MetricsLog",
    "RunCurve",
    "RunFigures",
    "draw_curves",
    "format_bytes",
    "metrics_table",
    "read_log",
    "to_markdown",
]
