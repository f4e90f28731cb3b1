"""Helpers that the benchmarks and the study share.

charts.py      charts, as PNG files
console.py     what is said while a program runs
devices.py     the device, and its name
failures.py    rows that could not be measured
flags.py       checks of flags
memory.py      resident memory
results.py     results on disk
timing.py      timing in turn
"""
