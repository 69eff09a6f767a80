"""Benchmarks: our training step, store, harvest and quality beside the peers', on one machine, on the same bytes.

Each suite is a module with `run(folder, options) -> rows` and `COLUMNS`, the columns of its printed table;
`suites.py` finds them by name. Timings of different implementations are taken in turn, in processes that are alive
together, so that drift of the machine hits all of them.
"""
