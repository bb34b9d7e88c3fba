"""The bundled safety checker: a small network that knows drawings, photographs and unsafe pictures apart.

May import: torch, numpy and `errors`.
Must not hold: policies for unsafe images, checkers of other models.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "model.safetensors"
CONFIG = FOLDER / "config.json"
