"""Locating parts by changing weights and reading a metric: nothing else is asked of the metric."""
