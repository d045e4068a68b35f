"""Where it is kept: adapters of the ports over Redis, S3, registries and disks."""
