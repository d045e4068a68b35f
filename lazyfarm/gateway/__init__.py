"""The gateway: how drivers outside the cluster use the farm, without Ray. Both of its ends."""
