"""The study of strided statistics and depthwise scales, run by `python -m study`.

__main__.py     the program
recipes.py      what is trained: hyper-parameters with units and sources
data.py         images, from folders or tensorflow-datasets
pipeline.py     batches of them, augmented, the same for every variant
models.py       networks with the initial weights of a seed
proof.py        which operations of BatchNormalization a step executed, and how long they took
training.py     one run
running.py      all runs, one after the other
results.py      finished runs on disk
statistics.py   what can be said of paired runs
program.py      the digest of the code that trains
charts.py       pictures
pairs.py        runs in pairs
markdown.py     tables and sentences of the page
left_out.py     what was not run
report.py       the page
"""
