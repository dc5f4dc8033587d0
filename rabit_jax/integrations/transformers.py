"""Packed models in transformers: importing this module registers the quantiser "rabit".

    import rabit_jax.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(PACKED, dtype="auto")

Every packed matrix becomes the dense one that the packed model multiplies by, so the model has the
size of an unquantised one and is an ordinary model of transformers: it may be trained or saved.
Without this import transformers refuses a packed folder, for it takes the entry
`transformers_weights` of config.json for the name of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rabit_jax.errors import BadInput
from rabit_jax.formats.packed_file import (
    METHOD,
    check_version,
    checksum,
    in_memory,
    open_packed,
    part_names,
)
from rabit_jax.types import Json
from rabit_jax.weights.leaves import WeightNode, row_signs
from rabit_jax.weights.representations import abstract_packed
from rabit_jax.weights.table import Table

if TYPE_CHECKING:
    import torch
    from transformers.core_model_loading import WeightConverter


# Tensors of a file by name, as transformers hands them to a conversion.
Given: TypeAlias = Mapping[str, "torch.Tensor | list[torch.Tensor]"]


@register_quantization_config(METHOD)
class RabitConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder's config.json.

    Attributes:
      dequantize: always true: what is loaded is dense.
      fields: the entries of config.json.
    """

    def __init__(self, **fields: object) -> None:
        """Raises BadInput for another format or version than the one that is read here."""
        check_version(fields, "quantization_config of config.json")
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  (an enum there)
        self.dequantize, self.fields = True, fields


@register_quantizer(METHOD)
class RabitQuantizer(HfQuantizer):
    """Unpacks the matrices of a packed folder while transformers loads it."""

    modules: dict[str, Json]
    sha256: dict[str, str]
    version: int

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        """Raises BadInput where the model is not packed but is to be quantised on the way."""
        if not self.pre_quantized:
            raise BadInput("transformers cannot quantise by the method 'rabit': pack the model by "
                           "rabit_jax, and load the packed folder")

    def update_attn_implementation(self, config: Any) -> Any:
        """The model's config without the entry that makes transformers refuse the folder."""
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: object, checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> None:
        """Reads the header of the packed file."""
        if not checkpoint_files or len(checkpoint_files) != 1:
            raise BadInput(f"a packed folder holds one file of weights, found {checkpoint_files}")
        with open_packed(Path(checkpoint_files[0])) as file:
            self.modules, self.sha256, self.version = file.modules, file.sha256, file.version

    def update_weight_conversions(
        self, weight_conversions: list[WeightConverter], model: object
    ) -> list[WeightConverter]:
        """The model's own conversions, and for each packed module that of its arrays."""
        return [*weight_conversions, *map(self._conversion, self.modules)]

    def _conversion(self, module: str) -> WeightConverter:
        from transformers.core_model_loading import WeightConverter

        names = _part_list(self.modules[module])
        sources = [f"{module}.{name}" for name in names]
        # Transformers takes names for patterns, and a dot for any character: that is harmless, but
        # `model.layers.1` must not be found in `model.layers.11`, so a pattern has both ends.
        unpack: Any = _Unpack(self, module, names)
        return WeightConverter([f"^{source}$" for source in sources], f"{module}.weight", [unpack])

    @property
    def is_trainable(self) -> bool:
        """A dense model may be trained."""
        return True

    def is_serializable(self) -> bool:
        """A dense model may be saved."""
        return True


class _Unpack:
    """The arrays of one packed module to its dense weight; an operation of transformers."""

    supports_many_to_many = False

    def __init__(self, hf_quantizer: RabitQuantizer, module: str, names: list[str]) -> None:
        # Of an operation with a `hf_quantizer`, transformers casts no array before it is converted.
        self.hf_quantizer: Any = hf_quantizer
        self.module, self.names = module, names

    def __deepcopy__(self, memo: object) -> _Unpack:
        return self  # transformers copies it for every tensor

    def convert(
        self, input_dict: Given, model: torch.nn.Module, **kwargs: object
    ) -> dict[str, torch.Tensor]:
        """`{name of the weight: W_hat^T [o, i]}` in the dtype of the model's parameter.

        Raises:
          BadInput: an array that is missing or was altered.
        """
        import torch

        given = {name.strip("^$"): value for name, value in input_dict.items()}
        arrays = {name: self._array(given, f"{self.module}.{name}") for name in self.names}
        quantizer = self.hf_quantizer
        node = _filled(quantizer.modules[self.module], arrays, quantizer.version)
        # A kernel [i, o] is a torch weight [o, i]; an embedding is [v, d] in both.
        found = np.asarray(node.dense())
        dense = np.array(found if isinstance(node, Table) else found.T, order="C")
        target = f"{self.module}.weight"
        # AutoModel builds the decoder without its head, whose names have no prefix.
        prefix = f"{model.base_model_prefix}."
        bare = target.startswith(prefix) and model.base_model is model
        own = target.removeprefix(prefix) if bare else target
        return {own: torch.from_numpy(dense).to(model.get_parameter(own).dtype)}

    def _array(self, given: Given, name: str) -> np.ndarray:
        found = given.get(name)
        found = found[0] if isinstance(found, list) else found
        if found is None:
            raise BadInput(f"the packed file lacks the tensor {name}: fetch it again")
        array = found.cpu().numpy()
        if checksum(array) != self.hf_quantizer.sha256.get(name):
            raise BadInput(f"the tensor {name} is altered, its checksum differs from the one in "
                           "the header of the file: fetch it again")
        return array


def _part_list(header: Json) -> list[str]:
    """The names of a packed module's arrays, in the order of its leaves."""
    return jax.tree.leaves(part_names(abstract_packed(header)))


def _filled(header: Json, arrays: Mapping[str, np.ndarray], version: int) -> WeightNode:
    """The packed node of a header with its arrays, from a file of that version."""
    node = abstract_packed(header)
    return jax.tree.map(
        lambda name, signs: jnp.asarray(in_memory(arrays[name], signs, version)),
        part_names(node), row_signs(node))
