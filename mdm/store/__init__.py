"""Where the state is kept: the interface (``base``) and the embedded default (``sqlite``)."""
