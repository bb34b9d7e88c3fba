"""Decoder: image embeddings -> encoded images, in this process or behind Triton, on PyTorch, ONNX Runtime or TensorRT.

May import: `config`, `storage`, `noise`, and what they may.
Must not hold: users, catalogs, Ray.
"""
