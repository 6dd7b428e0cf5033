"""What tests of searches and update rules may import: simulated workers, scores and searches."""
