"""The runtime: arena, request state, executors and the sampling loop; sees only plain data."""
