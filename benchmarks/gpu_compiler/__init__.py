"""What XLA makes of a network for a GPU that need not be there, for gpu_compiled.py.

targets.py     GPUs, as XLA's compiler knows them
lowered.py     networks, as what XLA is given of them; needs TensorFlow
compiler.py    the compiler, in a process of its own; needs JAX with its plugin for CUDA
hlo.py         compiled programs read: kernels, and the bytes that they move
"""
