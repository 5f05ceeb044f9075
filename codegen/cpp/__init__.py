"""The C++ printer: vectorised, OpenMP, one shared library per program."""
