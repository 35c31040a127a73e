"""Core AI: `.aimodel` assets."""
