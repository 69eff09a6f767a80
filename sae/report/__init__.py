"""Metric sinks, figures, tables, progress and the self-contained HTML report of a run."""
