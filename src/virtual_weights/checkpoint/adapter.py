"""Low-rank adapters in peft's format: what is added to the weights of modules, as two thin factors of each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from virtual_weights.checkpoint.folder import names_in, parse_json_object, pin_inside
from virtual_weights.checkpoint.safetensors_source import SafetensorsSource, open_safetensors_file
from virtual_weights.checkpoint.source import Opening
from virtual_weights.errors import CheckpointError, MalformedCheckpointError, UnsafeCheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
_OFF: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""Settings that would change more than two factors a module, or the base itself, with the values that do not."""


@final
@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to the weight of one module: ``scale B A``.

    Attributes:
        down: name of A, (rank, in).
        up: name of B, (out, rank).
        scale: alpha over the rank, or over its root.
    """

    down: str
    up: str
    scale: float


@final
class Adapter:
    """A folder that peft wrote: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: where they are.

    Attributes:
        folder: the same.
        weights: what holds the factors.
        modules: by the module's path in transformers, such as ``"model.layers.3.self_attn.q_proj"``.

    Raises:
        CheckpointError: it is no such folder, or an adapter that adds anything but ``scale B A``.
        UnsafeCheckpointError: its weights are pickled.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        names = names_in(self.folder)
        if CONFIG not in names:
            raise _malformed(self.folder, f"holds no {CONFIG}", "a folder that peft's save_pretrained wrote")
        if WEIGHTS not in names:
            pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
            raise (UnsafeCheckpointError if pickled else CheckpointError)(
                f"{str(self.folder)!r} holds {'pickled weights' if pickled else f'no {WEIGHTS}'}",
                expected=WEIGHTS,
                do="save the adapter with safetensors: save_pretrained(..., safe_serialization=True)",
            )
        file = pin_inside(self.folder, CONFIG)
        self._config = parse_json_object(file.read(0, file.size), str(file.path))
        self._refuse()
        self.weights: SafetensorsSource = open_safetensors_file(
            self.folder / WEIGHTS, Opening(str(self.folder / WEIGHTS), self._config, allow_non_finite=False)
        )
        self.modules = self._modules()

    @property
    def fingerprint(self) -> str:
        """A hex sha256 of settings and factors."""
        return self.weights.fingerprint

    @property
    def _transposed(self) -> bool:
        """Whether the base's weights are stored as (in, out)."""
        return bool(self._config.get("fan_in_fan_out"))

    def shape(self, module: str) -> tuple[int, int]:
        """Of what is added to the weight of a module, as transformers stores it."""
        part = self.modules[module]
        out, into = self.weights.tensors[part.up].shape[0], self.weights.tensors[part.down].shape[1]
        return (into, out) if self._transposed else (out, into)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Left (rows, rank) and right (rank, columns) in float64, whose product is added to the weight as stored."""
        part = self.modules[module]
        up, down = part.scale * self.weights.read(part.up).double(), self.weights.read(part.down).double()
        return (down.T, up.T) if self._transposed else (up, down)

    def _modules(self) -> dict[str, LowRank]:
        sides: dict[str, dict[str, str]] = {}
        for name in self.weights.tensors:
            found = _FACTOR.fullmatch(name)
            if found is None or found["embedding"]:
                what = "an embedding" if found else f"a tensor {name!r} that is no factor of a module"
                raise _malformed(self.folder, f"changes {what}", "lora_A and lora_B of linear maps")
            sides.setdefault(found["module"], {})[found["side"]] = name
        modules: dict[str, LowRank] = {}
        for module, factors in sides.items():
            shapes = [self.weights.tensors[name].shape for name in factors.values()]
            if factors.keys() != {"A", "B"} or {len(shape) for shape in shapes} != {2}:
                raise _malformed(self.folder, f"has not both factors of {module}", "lora_A (r, in) and lora_B (out, r)")
            down, up = factors["A"], factors["B"]
            rank = self.weights.tensors[down].shape[0]
            if self.weights.tensors[up].shape[1] != rank or rank != self._setting("r", "rank_pattern", module):
                raise _malformed(
                    self.folder,
                    f"has factors {self.weights.tensors[up].shape} and {self.weights.tensors[down].shape} of {module}",
                    f"rank {self._setting('r', 'rank_pattern', module)}, as {CONFIG} says",
                )
            alpha = float(self._setting("lora_alpha", "alpha_pattern", module))
            root = bool(self._config.get("use_rslora"))
            modules[module] = LowRank(down, up, alpha / (math.sqrt(rank) if root else rank))
        return modules

    def _setting(self, name: str, patterns: str, module: str) -> Any:
        """A setting of a module: that of the first pattern which matches the end of its path, or the general one."""
        for pattern, value in (self._config.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return self._config.get(name)

    def _refuse(self) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise _malformed(self.folder, f"is of type {kind!r}", "an adapter of type 'LORA'")
        for name, allowed in _OFF.items():
            value = self._config.get(name)
            if value is not None and all(value != other or type(value) is not type(other) for other in allowed):
                raise _malformed(
                    self.folder,
                    f"has {name} = {value!r}, which changes more than two factors of each module say",
                    f"{name} = {' or '.join(map(repr, allowed)) or None}",
                )
        for name, kinds in (("r", int), ("lora_alpha", (int, float))):
            value = self._config.get(name)
            if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
                raise _malformed(self.folder, f"has {name} = {value!r}", "a number above 0")


def _malformed(folder: Path, what: str, expected: str) -> CheckpointError:
    return MalformedCheckpointError(
        f"the adapter {str(folder)!r} {what}",
        expected=expected,
        do="merge the adapter into its base by peft (merge_and_unload(), then save_pretrained()) and open that model",
    )


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter's settings."""
    return (Path(path).expanduser() / CONFIG).is_file()
