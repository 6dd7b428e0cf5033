"""Training, without a word of pruning."""
