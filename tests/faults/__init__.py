"""Faults of the world around a running workflow: `make test-faults`, apart from other tests, as it takes minutes."""
