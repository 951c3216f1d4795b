"""Linear solvers for (A + damping I) w = b, row by row, each with an honest status."""
