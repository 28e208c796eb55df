"""The MDM killed at every boundary of what it does: see ``run``."""
