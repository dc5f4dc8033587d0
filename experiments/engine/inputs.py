"""What the stages of task qat share: mesh, text, and the models that earlier ones left."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rabit_jax import LLAMA_ENDS, BadInput, Stats, convert, hosts
from rabit_jax.atomic import write_tensors
from rabit_jax.data.tokens import batch
from rabit_jax.evaluate.diagnostics import Apply
from rabit_jax.experiments.engine.config import to_dict
from rabit_jax.experiments.engine.fitting import Measure, keep, kept
from rabit_jax.experiments.engine.folder import RunFolder
from rabit_jax.experiments.engine.records import check_files
from rabit_jax.experiments.engine.settings import Init, Nested, RunConfig
from rabit_jax.experiments.engine.text import Text
from rabit_jax.formats.checkpoint import read_config
from rabit_jax.formats.hf import load_hf
from rabit_jax.formats.tokenizer import prompt_ids
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import Decoder, param_shapes
from rabit_jax.progress import loading
from rabit_jax.train.checkpoints import abstract
from rabit_jax.train.optimizer import (
    OptimizerConfig,
    check_moments,
    merge,
    partition,
    roles,
)
from rabit_jax.train.sharding import make_mesh, param_shardings, replicated, row_shards
from rabit_jax.tree import leaves, map_leaves, match_rules, weights_of
from rabit_jax.types import Json, Params
from rabit_jax.weights.budget import check_budget
from rabit_jax.weights.mixed_stack import sign_paths


class Inputs:
    """Text, models and mesh of a run, each loaded when first asked for."""

    def __init__(self, config: RunConfig, folder: RunFolder):
        """Loads nothing but the mesh.

        Raises:
          BadInput: the mesh does not fit the devices, or a batch does not divide over it.
        """
        self.config, self.folder = config, folder
        self.mesh = make_mesh(config.mesh)
        self.text = Text(config, self.mesh)
        self.stopped, self.measure = False, Measure()
        check_batches(config, row_shards(self.mesh))

    def check(self) -> None:
        """Read the text and refuse what cannot work, before anything is written.

        Raises:
          BadInput: text too short for a batch or a window, sequences longer than the model's,
            rules or frozen roles that leave nothing to do.
        """
        check_settings(self.config, self.model_config)
        if self.config.qat.teacher_top and hosts.several():
            raise BadInput("qat.teacher_top is made and read by one process: set it to 0 for "
                           "several")
        config, text = self.config, self.text
        lengths = _lengths(config)
        del lengths["evaluate"]
        size = self.model_config.vocab_size
        if not all(map(str.strip, config.generate.prompts)):
            raise BadInput("generate.prompts holds an empty prompt: give it some text")
        prompts = [len(prompt_ids(text.tokenizer, one, size)) for one in config.generate.prompts]
        longest = max(prompts, default=0) + config.generate.max_new_tokens
        check_lengths({"generate": longest}, self.model_config.max_position)
        for name, length in lengths.items():
            batch(text.train.tokens, 0, getattr(config, name).batch_size, length, config.seed)
        if text.unseen:
            text.windows(text.unseen)
        found = min(len(text.windows()), config.evaluate.diagnostic_windows)
        if found < row_shards(self.mesh):
            raise BadInput(
                f"the diagnostics have {found} windows for {row_shards(self.mesh)} parts of "
                "the mesh (data x fsdp): give more evaluation text or raise "
                "evaluate.diagnostic_windows"
            )

    # models

    @property
    def teacher_folder(self) -> str:
        """Folder or hub id of the teacher."""
        return self.config.teacher.path or str(self.folder.path / "teacher")

    @cached_property
    def model_config(self) -> ModelConfig:
        """The teacher's shape with the run's compute settings."""
        if self.config.teacher.path:
            found = read_config(self.config.teacher.path)
        else:
            end = self.text.tokenizer.eos_token_id
            found = ModelConfig(
                vocab_size=len(self.text.tokenizer),
                eos_ids=(end,),
                bos_id=end,
                **dataclasses.asdict(self.config.model),
            )
        return self.config.compute.applied(found)

    @cached_property
    def model(self) -> Decoder:
        """The decoder that teacher, student and packed model share."""
        return Decoder(self.model_config)

    @cached_property
    def features(self) -> Apply:
        """What the diagnostics read of the decoder: one function, so that it compiles once."""
        return lambda params, batch: self.model.apply(
            {"params": params}, batch["tokens"], batch.get("mask"), method="features"
        )[0]

    @cached_property
    def teacher(self) -> Params:
        """Full-precision params, placed on the mesh as they are read."""
        where = param_shardings(abstract_params(self.model_config), self.mesh)
        check_teacher(self.teacher_folder)
        with loading(self.teacher_folder) as done:
            return load_hf(self.teacher_folder, shardings=where, done=done)[1]

    @cached_property
    def stats(self) -> dict[str, Stats]:
        """Calibration statistics by path."""
        file = self.folder.path / "calibration.safetensors"
        check_files(self.folder.path, "calibrate", file.name)
        try:
            arrays = load_file(file)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"cannot read {file}: --force calibrate makes it again") from error
        paths = sorted({name.rsplit(".", 1)[0] for name in arrays})
        if hosts.several():
            arrays = hosts.on_mesh(arrays, replicated(self.mesh))
        arrays = jax.tree.map(jax.numpy.asarray, arrays)
        return {p: Stats(arrays[f"{p}.s_in"], arrays[f"{p}.s_out"]) for p in paths}

    def save_stats(self, stats: dict[str, Stats]) -> None:
        """Write what `stats` reads."""
        hosts.first_does(
            lambda: write_stats(self.folder.path / "calibration.safetensors", stats))

    def abstract_student(self) -> Params:
        """Shapes and shardings of the student."""
        shapes = jax.eval_shape(
            lambda p: convert(p, self.config.init.rules()), abstract_params(self.model_config)
        )
        return abstract(shapes, param_shardings(shapes, self.mesh))

    def save_init(self, student: Params) -> None:
        """Keep the weight nodes of a fresh student; everything else is the teacher's."""
        keep(self.folder, "init", weights_of(student))

    @cached_property
    def student_init(self) -> Params:
        """The student as initialised."""
        nodes = kept(self.folder, "init", weights_of(self.abstract_student()), "init")
        return map_leaves(lambda path, leaf: nodes.get(path, leaf), self.teacher)

    def save_student(self, trainable: Params) -> None:
        """Keep what QAT trained."""
        keep(self.folder, "student", trainable)

    @cached_property
    def student(self) -> Params:
        """The student after QAT."""
        target, _ = partition(self.abstract_student(), roles(self.abstract_student()), self._frozen)
        trainable = kept(self.folder, "student", target, "qat")
        _, frozen = partition(self.student_init, roles(self.student_init), self._frozen)
        return merge(trainable, frozen)

    @property
    def _frozen(self) -> tuple[str, ...]:
        return self.config.qat.optimizer.freeze

    def forget(self, *names: str) -> None:
        """Drop cached models, all or the named ones, so that the next use reads what is there."""
        for name in names or ("teacher", "stats", "student_init", "student"):
            self.__dict__.pop(name, None)


def check_settings(config: RunConfig, shape: ModelConfig) -> None:
    """Refuse settings that do not go with a model of this shape; neither text nor weights are read.

    Raises:
      BadInput: rules that select no kernel of a block, a budget or numbers of paths that the specs
        cannot have, frozen roles that leave nothing to train, sequences longer than the model's.
    """
    section, params = config.init, abstract_params(shape)
    student = jax.eval_shape(lambda p: convert(p, section.rules()), params)
    check_rules(weights_of(student))
    if config.task == "qat" and config.qat.teacher_top > shape.vocab_size:
        raise BadInput(f"qat.teacher_top is {config.qat.teacher_top} of a vocabulary of "
                       f"{shape.vocab_size}: keep fewer tokens, 64 or so")
    if section.budget:
        specs = match_rules(params, section.block_rules())
        check_budget(section.budget, specs, {p: x.shape for p, x in leaves(params)})
    lengths = _lengths(config)
    for name in ("tune", "end_to_end", "qat"):
        if name in lengths:
            _check_prefixes(name, getattr(config, name), student)
            _check_optimizer(name, getattr(config, name).optimizer, student)
    check_lengths(lengths, shape.max_position)


def _check_optimizer(name: str, settings: OptimizerConfig, student: Params) -> None:
    """Raise BadInput where nothing of the student would train, or its moments would stand still."""
    names = roles(student)
    trainable, _ = partition(student, names, settings.freeze)
    if not jax.tree.leaves(trainable):
        raise BadInput(f"{name}.optimizer.freeze {list(settings.freeze)} leaves nothing to train")
    try:
        check_moments(settings, trainable, partition(names, names, settings.freeze)[0])
    except BadInput as error:
        raise BadInput(f"{name}.optimizer: {error}") from error


def _check_prefixes(name: str, section: Nested, student: Params) -> None:
    """Raise BadInput for nested paths that the student has not."""
    most, prefixes = max(sign_paths(student), default=0), section.prefixes
    if prefixes and max(prefixes) != most:
        raise BadInput(
            f"{name}.nested is {list(prefixes)}, and the weights have {most} "
            "sign paths that can be nested: its largest number must be that of the whole "
            "model, init.spec.k, of a type such as residual")


def check_batches(config: RunConfig, rows: int) -> None:
    """Raise BadInput where a batch, or a piece of one, does not divide over `rows` parts of a mesh.
    """
    for name in _lengths(config):
        section = getattr(config, name)
        pieces = getattr(section, "accumulate", 1)
        if section.batch_size // pieces % rows:
            cut = f" in {pieces} pieces" if pieces > 1 else ""
            raise BadInput(
                f"{name}.batch_size is {section.batch_size}{cut} for {rows} parts of the mesh "
                f"(data x fsdp): make it a multiple of {rows * pieces}, or set mesh"
            )


def _lengths(config: RunConfig) -> dict[str, int]:
    """Tokens of a sequence by the section of the config that asks for it."""
    if config.task == "qat":
        own = () if config.teacher.path else ("teacher",)
        named = {name: getattr(config, name).length for name in (*own, "calibrate", "qat")}
        return {**named, "evaluate": config.evaluate.context}
    read = {"calibrate": config.calibrate.mode != "none", "tune": config.tune.epochs,
            "end_to_end": config.end_to_end.steps}
    named = {name: getattr(config, name).length for name, wanted in read.items() if wanted}
    return {**named, "evaluate": config.evaluate.context} if config.evaluate.models else named


def check_teacher(path: str) -> None:
    """Verify a teacher that a run has trained, which lies beside the records of that run.

    Raises:
      BadInput: a file differs from the digest that the run noted.
    """
    folder = Path(os.path.expanduser(path))
    if folder.name == "teacher":
        check_files(folder.parent, "teacher", "teacher")


def check_rules(selected: Collection[str]) -> None:
    """Raise BadInput where the rules select no kernel of a block, or what is no kernel."""
    known = {path: re.fullmatch(rf"layers/.*/kernel|{LLAMA_ENDS}", path) for path in selected}
    if other := [path for path, found in known.items() if not found]:
        raise BadInput(
            f"init.quantise selects {other[0]}: a run quantises the kernels of the blocks, "
            "layers/.../kernel, and embed/embedding and head/kernel"
        )
    if not any(path.startswith("layers/") for path in selected):
        raise BadInput("init.quantise and init.keep leave no kernel to quantise in the blocks")


def specs_of(section: Init) -> Json:
    """What config.json of a packed model says of the representations that it was made in."""
    own = {"embedding": to_dict(section.embedding)} if section.embedding else {}
    return {"spec": to_dict(section.spec), **own}


def check_lengths(lengths: Mapping[str, int], most: int) -> None:
    """Raise BadInput where a section of the config has longer sequences than the model."""
    for name, length in lengths.items():
        if length > most:
            raise BadInput(
                f"{name} uses sequences of {length} tokens: the model has {most} positions; make "
                "it shorter"
            )


def write_stats(target: Path, stats: dict[str, Stats]) -> None:
    """Write calibration statistics, whole or not at all."""
    arrays = {
        f"{p}.{n}": np.asarray(getattr(s, n)) for p, s in stats.items() for n in ("s_in", "s_out")
    }
    write_tensors(target, arrays)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes of a decoder's float32 params, nested."""
    from flax.traverse_util import unflatten_dict

    shapes = {p: jax.ShapeDtypeStruct(s, "float32") for p, s in param_shapes(config).items()}
    return unflatten_dict(shapes, sep="/")
