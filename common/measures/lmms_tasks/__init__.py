"""Tasks of our own for lmms-eval, which the library has not, or scores by a judge or server: each a definition in its
form, `<task>.yaml`, with what it calls in a module beside it. Where a rule scores what the library has a judge for, the
task's name ends in `_rule`."""
