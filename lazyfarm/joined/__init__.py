"""A driver that has joined the cluster: over Ray's actors, and Redis."""
