"""Manifests of the tracking server."""
