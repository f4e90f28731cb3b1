"""What the benchmarks of training do on torch.

room.py      functions of tensors and training steps; see `backends`
profiles.py  what ran, by torch.profiler, and for which BatchNormalization
"""
