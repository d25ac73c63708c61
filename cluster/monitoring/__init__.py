"""Metrics of a run, alert rules on them, a dashboard, and what scrapes them."""
