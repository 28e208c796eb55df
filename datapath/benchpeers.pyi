"""Peers that do nothing, for the layer benchmarks."""

def serve_null_sds(fd: int) -> None:
    """Answers one SDC's connection until it ends, storing nothing. Owns ``fd``; does not hold the GIL."""

def serve_null_file(fuse_fd: int, relay_fd: int, inode: int) -> None:
    """Serves one inode of a mount as a file of zeros until the mount is gone. Owns ``fuse_fd``, borrows
    ``relay_fd``; does not hold the GIL."""
