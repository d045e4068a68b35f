"""What `lazyfarm up` starts on one machine: Redis, an S3 server and Ray nodes, as processes of one state directory."""
