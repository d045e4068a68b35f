"""The solver: what of a build graph is cached, what must run, in which order, and for whom."""
