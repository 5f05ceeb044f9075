"""The C++ printer: vectorised, on a team of threads, one shared library per program."""
