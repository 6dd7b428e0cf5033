"""What mutations.py changes in a run directory, and how it judges the answers."""
