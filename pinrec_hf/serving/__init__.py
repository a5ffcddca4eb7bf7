"""`pinrec serve`: a release behind HTTP, with histories, dynamic batching, limits and metrics."""
