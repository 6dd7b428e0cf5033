"""How fidelity.py judges scores: masks, depths, agreement with long fine-tuning."""
