"""Core ML: `.mlpackage` assets."""
