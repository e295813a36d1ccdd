"""Checkpoints of a small model, made once a worker, and a way to spoil copies of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
from torch import Tensor

from model.checkpoint.inventory import FAMILIES, Family
from model.checkpoint.write import make_checkpoint
from model.config import ModelConfig

SEED = 5
SHARD_BYTES = 300_000  # several shards, some tensors larger than one


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Four layers of all kinds and a draft block; fewer experts than `tiny`, for speed."""
    return replace(ModelConfig.named("tiny"), n_routed_experts=4)


@pytest.fixture(scope="session")
def made(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """A checkpoint of each family, from one seed. Read only."""
    root = tmp_path_factory.mktemp("made")
    for family in FAMILIES:
        make_checkpoint(root / family, config, family, seed=SEED, shard_bytes=SHARD_BYTES, progress=False)
    return {family: root / family for family in FAMILIES}


class Copy:
    """A copy of a checkpoint, written by the safetensors library, to be changed at will."""

    def __init__(self, source: Path, directory: Path) -> None:
        shutil.copytree(source, directory)
        self.directory = directory

    @property
    def index(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._index_path.read_text())["weight_map"]
        return found

    @property
    def _index_path(self) -> Path:
        return self.directory / "model.safetensors.index.json"

    def write_index(self, weight_map: dict[str, str]) -> None:
        self._index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def file(self, tensor: str) -> Path:
        return self.directory / self.index[tensor]

    def edit(self, tensor: str, change: Callable[[dict[str, Tensor]], object], *, index: bool = True) -> None:
        """Rewrites the shard that holds `tensor` after `change` has had its way with the shard's tensors."""
        file, weight_map = self.file(tensor), self.index
        # clones: the library maps the file, which is about to be overwritten
        tensors = {name: value.clone() for name, value in safetensors.torch.load_file(file).items()}
        before = set(tensors)
        change(tensors)
        safetensors.torch.save_file(tensors, file)
        if index:
            for gone in before - set(tensors):
                del weight_map[gone]
            weight_map.update(dict.fromkeys(tensors, file.name))
            self.write_index(weight_map)

    def set(self, tensor: str, value: Callable[[Tensor], Tensor]) -> None:
        self.edit(tensor, lambda tensors: tensors.update({tensor: value(tensors[tensor])}))

    def rename(self, old: str, new: str) -> None:
        self.edit(old, lambda tensors: tensors.update({new: tensors.pop(old)}))

    def remove(self, *tensors: str) -> None:
        for name in tensors:
            self.edit(name, lambda shard, name=name: shard.pop(name))  # type: ignore[misc]

    def rewrite(self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """Puts what `change` makes of all tensors into one shard."""
        everything: dict[str, Tensor] = {}
        for file in self.directory.glob("*.safetensors"):
            everything.update((name, value.clone()) for name, value in safetensors.torch.load_file(file).items())
            file.unlink()
        changed = change(everything)
        safetensors.torch.save_file(changed, self.directory / "all.safetensors")
        self.write_index(dict.fromkeys(changed, "all.safetensors"))

    def set_config(self, **values: object) -> None:
        path = self.directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def copy(made: dict[Family, Path], tmp_path: Path) -> Callable[[Family], Copy]:
    return lambda family: Copy(made[family], tmp_path / family)
