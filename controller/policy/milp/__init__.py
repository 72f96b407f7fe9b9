"""The pool MILP: how many instances of which tensor parallelism for which pool."""
