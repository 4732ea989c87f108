"""An adapted model: its state, how it changes, and its files."""
