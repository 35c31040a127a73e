"""What a bundle would be, without building it: sizes, rates, and entries for new models."""
