"""Evaluation: does it recommend? Measures, a verifier and a baseline, as pure functions of arrays.

May import: `prior`, `decoder`, `data`, `catalog`, and all that they may import.
Must not hold: files, Ray, or anything that trains the prior.
"""
