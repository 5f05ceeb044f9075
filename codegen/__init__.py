"""Code generation: one kernel description, printed as C++ or as Triton."""
