"""What a plan does: the compressed model on the search split, losses around it, latency, refitting."""
