"""The control RPC: msgpack messages over authenticated TCP connections. See docs/internals/control-rpc.md."""
