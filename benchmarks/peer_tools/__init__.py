"""Tools that `peers.py` compares, and how it compares them.

tools.py        the tools: a converter and a runtime each
converters.py   what makes a model of the original
runtimes.py     what runs it
work.py         the files of one model
bn_count.py     how much BatchNormalization is left in a graph
nodes.py        graphs of TensorFlow, ONNX, OpenVINO and LiteRT, for counting
steps.py        what is done in a process of its own
tables.py       tables and the chart
"""
