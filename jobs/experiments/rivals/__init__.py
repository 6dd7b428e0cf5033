"""What compare.py compares: rivals, equal fine-tuning, tables."""
