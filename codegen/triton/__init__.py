"""The Triton printer: one function per kernel."""
