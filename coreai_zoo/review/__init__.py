"""What a change does: differences, golden graphs, and the checks before a merge."""
