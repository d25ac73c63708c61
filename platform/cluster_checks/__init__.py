"""Preflight: what a cluster is and can do, checked before days of it are spent."""
