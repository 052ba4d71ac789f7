"""Measurements: run as modules from the repository's root, never as tests."""
