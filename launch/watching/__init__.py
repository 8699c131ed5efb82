"""A run in the terminal, live: `zoray watch`."""
