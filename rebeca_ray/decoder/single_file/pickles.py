"""Refuse pickles, which can run code, and convert those of tensors to safetensors."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from rebeca_ray.decoder.headers import PICKLES
from rebeca_ray.errors import InputError


def refuse_pickle(key: str, file: str) -> None:
    """Raise InputError for a setting that names a pickle."""
    if file.endswith(PICKLES):
        raise InputError(
            f"decoder.{key} {file}: a pickle can run code when loaded; give the .safetensors file, "
            f"or convert it: rebeca convert {file} {file.rpartition('.')[0]}.safetensors"
        )


def convert_pickle(pickle: Path, out: Path) -> int:
    """Write the tensors of a `.bin` file as safetensors, with names joined by dots; return their number.

    Raises InputError if it holds anything but tensors in dicts, or if `out` exists. Code in the file never
    runs.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: the output is a safetensors file; name it {out.stem}.safetensors")
    if out.exists():
        raise InputError(f"{out}: already exists; remove it, or give another name")
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist; make it first")
    import torch
    from safetensors.torch import save

    try:
        content = torch.load(pickle, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{pickle}: cannot be read ({error.strerror}); nothing is written") from None
    except UnpicklingError:  # its text advises to load the file without checks
        raise InputError(
            f"{pickle}: holds objects other than tensors, which may be code; nothing was run or written"
        ) from None
    except Exception as error:  # the unpickler fails on junk in many ways
        raise InputError(
            f"{pickle}: is not a file that torch saved ({type(error).__name__}); nothing is written"
        ) from None
    # A checkpoint of a training has its weights beside counters, which no model needs.
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value.contiguous().clone()
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, f"{name}.{key}" if name else str(key))
        else:
            raise InputError(
                f"{pickle}: {name or 'the file'} is a {type(value).__name__}, expected tensors; "
                "nothing is written"
            )

    collect(content, "")
    out.write_bytes(save(tensors))  # save_file would ignore the umask
    return len(tensors)
