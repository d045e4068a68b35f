"""What the cluster decides: values, rules and states; no Ray, no Redis, no S3, no clock."""
