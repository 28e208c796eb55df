"""What tests share: clusters, mounts, the command line, waiting."""
