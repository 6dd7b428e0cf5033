"""The parts of ``jobs/rules.py``."""
