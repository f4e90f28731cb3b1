"""The study of strided statistics and depthwise scales, run by `python -m study`.

recipes.py      what is trained: hyper-parameters with units and sources
data.py         images, from folders or tensorflow-datasets
pipeline.py     batches of them, augmented, the same for every variant
models.py       networks with the initial weights of a seed
proof.py        which operations of BatchNormalization a step executed, and how long they took
training.py     one run
results.py      finished runs on disk
statistics.py   what can be said of paired runs
charts.py       pictures
report.py       the page
"""
