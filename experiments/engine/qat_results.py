"""The stages of task qat behind training: scores, the packed model, samples of its text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax import ResidualSignSpec, convert, describe, hosts, pack
from rabit_jax.calibration.outliers import record_limbs
from rabit_jax.evaluate.perplexities import unigram_entropy
from rabit_jax.evaluate.sign_statistics import disordered_share, snapshot
from rabit_jax.experiments.engine.inputs import Inputs, specs_of
from rabit_jax.experiments.engine.measure import (
    diagnostics,
    divergence,
    reconstruction_errors,
    scores,
)
from rabit_jax.experiments.engine.records import Record
from rabit_jax.formats.folder import find_folder, read_generation
from rabit_jax.formats.packed_model import load_packed, packed_bytes, save_packed
from rabit_jax.formats.tokenizer import prompt_ids
from rabit_jax.models.generation import generate
from rabit_jax.models.prepared import Engine, prepare
from rabit_jax.progress import progress
from rabit_jax.train.sharding import param_shardings
from rabit_jax.tree import map_leaves, match_rules, weights_of
from rabit_jax.types import Array
from rabit_jax.weights.mixed_stack import at_most_paths, first_paths
from rabit_jax.weights.rounding import round_to_nearest


def evaluate(run: Inputs, continues: bool) -> Record:
    """Perplexity of teacher, baselines, init and student; diagnostics of init and student."""
    return {
        "teacher": scores(run, run.teacher, "teacher"),
        **(baselines(run) if run.config.evaluate.baselines else {}),
        "init": scores(run, run.student_init, "init"),
        "qat": {**scores(run, run.student, "student"), "kl": divergence(run, run.student)},
        **({"nested": nested_scores(run)} if run.config.qat.nested else {}),
        "unigram_nats": unigram_entropy(run.text.windows(), run.model_config.vocab_size),
        "diagnostics": {
            "qat": diagnostics(run, run.student),
            "qat_student": diagnostics(run, run.student, "student"),
            "init_student": diagnostics(run, run.student_init, "student"),
        },
        "relative_error": reconstruction_errors(run.teacher, run.student),
        "disordered": disordered_share(run.student),
    }


def nested_scores(run: Inputs) -> Record:
    """Scores and sizes of the models of the first paths that were trained together."""
    found, packed = {}, pack(hosts.whole(run.student))
    for n in run.config.qat.prefixes:
        small = first_paths(run.student, n)
        size = describe(at_most_paths(packed, n))
        found[str(n)] = {
            **scores(run, small, f"student, paths {n}"),
            "stored_bits_per_weight": size.stored_bits_per_weight,
            "whole_model_bits_per_weight": size.whole_model_bits_per_weight,
        }
    return found


def baselines(run: Inputs) -> Record:
    """Scores of what needs no calibration: greedy SVID and round-to-nearest."""
    spec, found = run.config.init.spec, {}
    rules = [(pattern, None) for pattern in run.config.init.keep]
    if isinstance(spec, ResidualSignSpec):
        plain = dataclasses.replace(spec, rounds=0, a_in=0.0, a_out=0.0)
        greedy = convert(run.teacher, rules + [(p, plain) for p in run.config.init.quantise])
        found["greedy"] = scores(run, greedy, "greedy init")
    selected = match_rules(run.teacher, run.config.init.block_rules())
    rounding = jax.jit(round_to_nearest)
    nearest = map_leaves(lambda p, w: rounding(w) if p in selected else w, run.teacher)
    found["round_to_nearest"] = {
        **scores(run, nearest, "round to nearest"),
        "bits_per_weight": 2.25,
    }
    return found


def packing(run: Inputs, continues: bool) -> Record:
    """Write the packed model, read it back, and score what was read."""
    student = hosts.whole(run.student)
    packed = record_limbs(pack(student), hosts.whole(run.stats))
    folder = run.folder.path / "packed"
    spec = specs_of(run.config.init)
    generation = read_generation(find_folder(run.teacher_folder))

    def write() -> None:
        save_packed(folder, run.model_config, packed, run.text.tokenizer, spec, generation,
                    run.config.teacher.path)

    hosts.first_does(write)
    _, read, _ = load_packed(folder)
    signs, written = snapshot(student), snapshot(read)
    placed = hosts.on_mesh(read, param_shardings(read, run.mesh)) if hosts.several() else read
    same = jax.tree.map(lambda a, b: bool((a == b).all()), weights_of(packed), weights_of(read))
    described = describe(packed)
    sizes = packed_bytes(folder)
    return {
        **scores(run, placed, "packed"),
        "bits_identical": all(same_signs(signs[path], written[path]) for path in signs)
        and all(jax.tree.leaves(same)),
        "bits_per_weight": described.bits_per_weight,
        "stored_bits_per_weight": sizes["stored_bits_per_weight"],
        "linear_bytes": sizes["linear_bytes"],
        "bytes": sizes["file_bytes"],
        "dense_bytes": describe(run.teacher).deployed_bytes,
    }


def same_signs(trained: Array, written: Array) -> bool:
    """Whether signs `[..., k, i, o]` were written as they are; a file leaves out paths that no
    layer has, whose signs are False."""
    k = written.shape[-3] if written.ndim > 2 else None
    if trained.shape == written.shape or k is None:
        return bool((trained == written).all())
    kept, others = trained[..., :k, :, :], trained[..., k:, :, :]
    return bool((kept == written).all()) and not bool(others.any())


def samples(run: Inputs, continues: bool) -> Record:
    """Continue the prompts with the teacher and with the packed model, same seed."""
    section, teacher = run.config.generate, hosts.whole(run.teacher)
    _, packed, _ = load_packed(run.folder.path / "packed")
    found = [{"prompt": prompt} for prompt in section.prompts]
    with progress("generate", 2 * len(found)) as bar:
        for n, (label, params) in enumerate((("teacher", teacher), ("packed", packed))):
            engine = prepare(run.model_config, params)
            for m, sample in enumerate(found):
                sample[label] = continuation(run, engine, sample["prompt"])
                bar.update(n * len(found) + m + 1)
    return {"samples": found}


def continuation(run: Inputs, engine: Engine, prompt: str) -> str:
    """One continuation of a prompt as text."""
    section = run.config.generate
    ids = prompt_ids(run.text.tokenizer, prompt, run.model_config.vocab_size)
    tokens = jnp.asarray([ids], jnp.int32)
    new = generate(
        run.model,
        engine,
        tokens,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        key=jax.random.key(run.config.seed),
        eos_ids=run.model_config.eos_ids,
    )
    return run.text.tokenizer.decode(np.asarray(new)[0], skip_special_tokens=True)
