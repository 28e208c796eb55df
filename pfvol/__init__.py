"""pfvol: a PowerFlex-style software-defined block store (the data plane's trio side, and the command line)."""

__version__ = "0.1.0"
