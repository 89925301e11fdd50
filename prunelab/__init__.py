"""Pruning methods behind one interface, with every number a paper reports beside its reproduction."""
