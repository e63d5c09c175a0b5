"""Reading checkpoint files that other programs wrote, without running any code in them."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from protoseg.runtime.errors import UserError, in_short


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or Hugging Face folder by name, without DataParallel's `module.`.

    Whatever else a file holds (counters, settings, log buffers) is passed over, and no code of it is run.
    Errors: UserError for a missing, unreadable or unsafe file, and for one without tensors.
    """
    if path.is_dir():
        state: dict[str, Any] = {}
        for file in folder_files(path):
            state |= read_state(file)
        return state
    if not path.is_file():
        raise UserError(f"no file or folder {path}: check the path of the weights")
    foreign: list[str] = []
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            if zipfile.is_zipfile(path):  # what torch.save writes since 1.6; older files hold tensors only
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(Inert, name) for name in foreign]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and is not opened: save its state_dict alone where it comes from"
        ) from error
    except Exception as error:  # damaged bytes can end in any error of the unpickler
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot be read ({reason}): is it a file of weights, and complete?"
        ) from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    )
    if not tensors:
        raise UserError(
            f"{path} holds more than tensors ({in_short(foreign, 1)}) and no state_dict: save that alone"
            if foreign
            else f"{path} holds no named tensors"
        )
    return {key.removeprefix("module."): value for key, value in tensors.items()}


class Inert:
    """Stands for any object in a file that is neither a tensor nor plain data: takes all, does nothing."""

    def __new__(cls, *args: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def folder_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                shards = json.loads(index.read_text())["weight_map"].values()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is no index of weight files: is it complete?") from error
            return [folder / shard for shard in sorted(set(shards))]
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin: check the path")
