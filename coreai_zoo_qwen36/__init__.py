"""Qwen3.5 and Qwen3.6 for the zoo: entries, sample checkpoints, and the plugin that registers the `qwen3_5` overlay."""
