"""The benchmark: time and memory against every peer."""
