"""Passes: each takes an IR module and returns a new one with the same meaning."""
