"""What pruning methods share: roles, plans, selection, adapters, cost, provenance. Knows no method."""
