"""Acme's models for the Core AI zoo: two fine-tunes, a clamped feed-forward, a head policy and a command."""
