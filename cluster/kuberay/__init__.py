"""Manifests for KubeRay, and what its operator refuses."""
