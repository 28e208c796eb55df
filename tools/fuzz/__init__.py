"""Random and damaged input for whatever reads what it cannot trust: one ``fuzz_*.py`` program per reader."""
