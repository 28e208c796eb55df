"""The control plane: metadata, placement, membership, the REST API."""
