"""Configuration files as package data: every YAML here is a complete run."""
