"""Collection: what takes space, and what of it may go."""
