"""What a run can be. Each module of this package is one kind of run: `run(spec, ...) -> metrics`."""
