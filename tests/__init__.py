"""The tests, by layer: the lowest broken layer shows first."""
