"""Exported: the engines that run an exported decoder: ONNX Runtime, OpenVINO, TensorRT.

May import: `networks` and `files` of the decoder, and their imports.
Must not hold: anything of one family; a graph is a plain function of tensors.
"""
