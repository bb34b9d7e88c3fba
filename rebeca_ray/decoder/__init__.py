"""Decoder: image embeddings -> encoded images, in this process or in Triton, by PyTorch, ONNX or TensorRT.

May import: `config`, `storage`, `noise`, and their imports.
Must not hold: users, catalogs, Ray.
"""
