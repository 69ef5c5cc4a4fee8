"""Healing: training what a compressed model stores until it does again what the dense model does."""
