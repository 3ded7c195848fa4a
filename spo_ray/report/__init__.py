"""HTML pages of runs, comparisons and sweeps, and their figures."""
