"""What maintainers run: which versions go together, and a release."""
