"""From a decoder to a traced program: torch.export, and what is done to its graphs."""
