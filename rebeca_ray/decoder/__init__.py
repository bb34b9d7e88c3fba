"""Decoder: image embeddings -> encoded images, locally or through Triton, run by PyTorch, ONNX Runtime or TensorRT.

May import: `config`, `storage`, `noise`, and their imports.
Must not hold: users, catalogs, Ray.
"""
