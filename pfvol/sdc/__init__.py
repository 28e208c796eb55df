"""The SDC: one process per mount that shows the volumes mapped to it as files."""
