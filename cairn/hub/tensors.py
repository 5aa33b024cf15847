"""The safetensors of a `transformers` folder, in one file or in shards, read by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cairn.errors import UserError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensors:
    """Which file has which tensor. Pickled weights are never read.

    Raises UserError naming the file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: dict[str, str] = {}
        for file in self._files():
            try:
                with safe_open(folder / file, framework="pt") as tensors:
                    self.file |= dict.fromkeys(tensors.keys(), file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / file}: {error}: fetch it again") from error

    def _files(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / FILE).is_file():
                raise UserError(
                    f"{self.folder} has no {FILE} (pickled weights are not read): save it with transformers again"
                )
            return [FILE]
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: no index of shards ({error!r}): fetch it again") from error
        for file in files:
            if not (self.folder / file).is_file():
                raise UserError(f"{self.folder}: {file}, a shard that {INDEX} names, is missing: fetch it")
        return files

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """For each name the tensor that the folder has under the other, in fp32."""
        out: dict[str, Tensor] = {}
        for file in sorted({self.file[theirs] for theirs in names.values()}):
            with safe_open(self.folder / file, framework="pt") as tensors:
                for name, theirs in names.items():
                    if self.file[theirs] == file:
                        out[name] = tensors.get_tensor(theirs).to(torch.float32)
        return out
