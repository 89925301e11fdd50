"""Rehearsals: every combination of task, model, method and data at paper scale, run whole on look-alikes on a CPU."""
