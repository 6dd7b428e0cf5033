"""A search as people see it while it runs: counted, logged, on the terminal and as metrics."""
