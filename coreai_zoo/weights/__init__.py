"""Weights: how they lie in memory, where they come from, how they are quantized and stored."""
