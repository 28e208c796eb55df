"""The SDS role: everything about a storage server that is decided, not moved (the bytes are datapath.target's)."""
