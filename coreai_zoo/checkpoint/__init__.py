"""A Hugging Face checkpoint: fetched, opened, read a slice at a time."""
