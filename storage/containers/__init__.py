"""Commands in containers: ``runc`` over a writable root, with mounts, secrets and limits."""
