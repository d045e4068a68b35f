"""OCI distribution client: references to manifests, blobs in and out, as whoever asks."""
