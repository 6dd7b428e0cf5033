"""What runs on workers: scores, fine-tuning, evaluations, latencies; and what they are given."""
