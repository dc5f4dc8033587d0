"""Folders with fields that change nothing, with absurd ones, and with ones of no sense."""

import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rabit_jax.errors import BadInput
from rabit_jax.formats.folder import find_folder, read_json
from rabit_jax.formats.hf import load_hf
from rabit_jax.formats.hf_config import from_hf
from rabit_jax.formats.packed_file import load_packed_params
from rabit_jax.formats.packed_model import load_packed, save_packed

BASE = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "eos_token_id": 2,
}
GEMMA = {**BASE, "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}
INERT = [
    {"attention_dropout": 0.1}, {"resid_pdrop": 0.1}, {"hidden_dropout": 0.0}, {"use_cache": False},
    {"pretraining_tp": 4}, {"is_encoder_decoder": False}, {"pruned_heads": {}}, {"prefix": None},
    {"unknown": None}, {"unknown": False}, {"unknown": []}, {"unknown": {}}, {"unknown": ""},
    {"logit_scale": 1.0}, {"_flash_attn_2_enabled": True}, {"_commit_hash": "abc"},
    {"gradient_checkpointing": True}, {"num_return_sequences": 1}, {"length_penalty": 1.0},
    {"tokenizer_class": "X"}, {"task_specific_params": {"a": 1}}, {"is_decoder": True},
    {"auto_map": {"AutoConfig": "a.B"}},
    {"rope_scaling": {"type": "default"}}, {"rope_scaling": {"rope_type": "linear", "factor": 1}},
    {"rope_scaling": {"type": "dynamic", "factor": 1.0}}, {"rope_scaling": {}},
    {"rope_scaling": {"type": "yarn", "factor": 1.0, "beta_fast": 32, "attention_factor": None}},
    {"rope_scaling": {"type": "default", "finetuned": False}},
    {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
    {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    {"sliding_window": 64}, {"quantization_config": {}}, {"partial_rotary_factor": 1.0},
    {"torch_dtype": "float32", "dtype": "float32"}, {"eos_token_id": [2]},
    {"neftune_noise_alpha": 5.0}, {"summary_type": "first"},
]
REFUSED = [
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000, wanted a positive integer of at most"),
    ({"vocab_size": 1e12}, "vocab_size is 1000000000000.0, wanted"),
    ({"vocab_size": int("9" * 300)}, r"vocab_size is 9{77}\.\.\., wanted"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, wanted .* at most 10000"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"hidden_size": "64"}, "hidden_size is '64'"), ({"head_dim": -2}, "head_dim is -2"),
    ({"num_key_value_heads": "x"}, "num_key_value_heads is 'x'"),
    ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000"),
    ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rotary field factor is 'x'"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rotary field factor is 0"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan"),
    ({"rope_scaling": {"type": {}, "factor": 2}}, "rotary field type is {}"),
    ({"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0,
                       "high_freq_factor": 4.0}}, "low_freq_factor is 4.0, wanted less"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "^unsupported rope_type 'yarn'"),
    ({"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 2.0}}, "^unsupported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 1.0, "original_max_position_embeddings": 8}},
     "^unsupported rope_type 'dynamic'"),
    ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 10000.0}}, "names two rotary bases"),
    ({"rope_theta": "x"}, "rope_theta is 'x'"), ({"rope_theta": -1}, "rope_theta is -1"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
    ({"initializer_range": "x"}, "initializer_range is 'x'"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', wanted true or false"),
    ({"attention_bias": 1}, "attention_bias is 1, wanted true or false"),
    ({"eos_token_id": {}}, "eos_token_id is {}, wanted a token id or a list of them"),
    ({"eos_token_id": ["</s>"]}, "eos_token_id is"), ({"eos_token_id": True}, "eos_token_id is T"),
    ({"bos_token_id": "1"}, "bos_token_id is '1'"), ({"model_type": []}, "^unsupported model_type"),
    ({"hidden_act": {}}, "hidden_act is {}"), ({"dtype": 16}, "dtype is 16"),
    ({"layer_types": "full"}, "layer_types is 'full'"), ({"layer_types": [{}]}, "layer_types is"),
    ({"sliding_window": 8}, "^unsupported sliding_window 8"),
    ({"sliding_window": 8, "use_sliding_window": True}, "^unsupported .* use_sliding_window"),
    ({"logit_scale": 2.0}, "^unsupported config field logit_scale"),
    ({"unknown": 0.5}, "^unsupported config field unknown = 0.5"),
    ({"auto_map": {"AutoModelForCausalLM": "a.B"}}, "^unsupported config field auto_map"),
    ({"rope_parameters": 7}, "rope_parameters is 7, wanted an object or null"),
]
GEMMAS = [
    ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ({"final_logit_softcapping": "x"}, "final_logit_softcapping is 'x'"),
    ({"rope_parameters": {"full_attention": [1]}}, "full_attention is .*wanted an object"),
    ({"rope_local_base_freq": 9.0, "rope_parameters": {"sliding_attention": {"rope_theta": 8.0}}},
     "names two rotary bases"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0},
      "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}},
     "^unsupported config with both"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
]


@pytest.mark.parametrize("change", INERT, ids=str)
def test_fields_that_change_nothing_are_accepted(change):
    assert from_hf(BASE | change) == from_hf(BASE)


@pytest.mark.parametrize("change, message", REFUSED)
def test_fields_of_no_sense_or_of_effect_are_refused_by_name(change, message):
    with pytest.raises(BadInput, match=message) as error:
        from_hf(BASE | change)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("change, message", GEMMAS)
def test_the_same_of_a_gemma(change, message):
    from_hf(GEMMA)
    with pytest.raises(BadInput, match=message):
        from_hf(GEMMA | change)


def edited(folder, name, **fields):
    file = folder / name
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**raw, **fields}))


@pytest.mark.parametrize("text, message", [
    ('{"a":' * 200_000, "nested too deeply"), ("[" * 200_000, "nested too deeply"),
    ('{"a": NaN}', "NaN, which is no finite number"), ('{"a": -Infinity}', "no finite number"),
    ('{"a": 1e999}', "1e999, which is no finite number"), ('{"a": ' + "9" * 9999 + "}", "cannot"),
    ("\udcff", "cannot read"), ("", "cannot read"),
])
def test_json_of_no_sense(folder, text, message):
    for name in ("config.json", "generation_config.json"):
        kept = (folder / name).read_text()
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(BadInput, match=f"cannot read .*{name}") as error:
            load_hf(folder)
        assert message in str(error.value)
        (folder / name).write_text(kept)


def test_what_is_no_file_or_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("rabit_jax.formats.folder.LARGEST_JSON", 10)
    with pytest.raises(BadInput, match="more than 10 bytes"):
        read_json(folder / "config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(BadInput, match="it is no file"):
        load_hf(folder)


@pytest.mark.parametrize("load, message", [(load_hf, "cannot read shard .* is no file"),
                                           (load_packed_params, "cannot read .* is no file")])
def test_a_pipe_in_the_place_of_weights_is_not_waited_for(folder, load, message):
    file = folder / "model.safetensors"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BadInput, match=message):
        load(folder if load is load_hf else file)


@pytest.mark.parametrize("fields, message", [
    ({"eos_token_id": {}}, "eos_token_id in .*generation_config.json is {}, wanted a token id"),
    ({"eos_token_id": "2"}, "is '2', wanted a token id"), ({"eos_token_id": [[2]]}, "wanted"),
])
def test_end_tokens_of_no_sense(folder, fields, message):
    edited(folder, "generation_config.json", **fields)
    with pytest.raises(BadInput, match=message):
        load_hf(folder)


@pytest.mark.parametrize("fields, message", [
    ({"num_hidden_layers": 9999}, "missing tensor"),
    ({"vocab_size": 2**31 - 1}, "tensor .* wanted"),
    ({"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}, "tensor .* wanted"),
    ({"intermediate_size": 2**31 - 1}, "tensor .* wanted"), ({"num_hidden_layers": 1}, "extra"),
    ({"max_position_embeddings": 2**31 - 1, "vocab_size": 62}, "tensor .* wanted"),
])
def test_sizes_that_the_file_does_not_have(folder, fields, message):
    """At once: neither the time nor the memory that such a model would take."""
    edited(folder, "config.json", **fields)
    begin = time.process_time()
    with pytest.raises(BadInput, match=message):
        load_hf(folder)
    assert time.process_time() - begin < 60


@pytest.mark.parametrize("table", [
    {}, [], {"a": "../b"}, {"a": ".."}, {"a": ""}, {"a": "/etc/passwd"}, {"a": 5}, "x",
    {"a": "config.json"}, {"a": "missing.safetensors"}, {"a": "a\0b"},
])
def test_indices_of_no_sense(folder, table):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(BadInput, match="weight_map|cannot read shard"):
        load_hf(folder)


def test_damaged_headers_of_safetensors(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = sorted(header)[1]
    odd = [b"", b"\0", b"\xff" * 9, (2**63).to_bytes(8, "little") + whole[8:]]
    for change in ({"dtype": "X9"}, {"shape": [2**62, 2**62]}, {"shape": [-1]}, {"shape": "x"},
                   {"data_offsets": [0, 10**18]}, {"data_offsets": [5, 1]}, {"dtype": "F8_E4M3"},
                   {"dtype": "I64", "shape": [1]}):
        text = json.dumps({**header, name: {**header[name], **change}}).encode()
        odd.append(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    deep = b'{"a":' * 100_000
    odd.append(len(deep).to_bytes(8, "little") + deep)
    for content in odd:
        file.write_bytes(content)
        with pytest.raises(BadInput):
            load_hf(folder)


def test_hostile_headers_of_packed_files(tmp_path, small, random_packed):
    """A header that was made on purpose has the right checksums."""
    from safetensors import safe_open

    from rabit_jax.formats.packed_file import metadata

    folder = save_packed(tmp_path / "p", small, random_packed(small))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "numpy") as opened:
        header = opened.metadata()
    config, modules = json.loads(header["config"]), json.loads(header["modules"])
    module = sorted(modules)[0]
    for change in ({"type": []}, {"type": "x"}, {"in": 10**18}, {"in": "x"}, {"in": None},
                   {"k": -1}, {"k": 10**9}, {"limbs": "x"}, {"more": 1}):
        odd = {**modules, module: {**modules[module], **change}}
        save_file(tensors, file, metadata(config, odd, tensors))
        with pytest.raises(BadInput):
            load_packed(folder)
    for name, text in (("modules", "[" * 100_000), ("config", "7"), ("sha256", "null"),
                       ("sha256", '{"a":' * 100_000), ("modules", '{"a": 5}')):
        save_file(tensors, file, {**header, name: text})
        with pytest.raises(BadInput):
            load_packed(folder)
    odd = {name: {**one, "in": np.iinfo(np.int64).max} for name, one in modules.items()}
    save_file(tensors, file, metadata(config, odd, tensors))
    with pytest.raises(BadInput):
        load_packed(folder)


def test_a_run_folder_stands_for_its_packed_model(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(BadInput, match="is no model folder, it holds neither config.json nor pack"):
        find_folder(run)
    (run / "config.yaml").write_text("")
    with pytest.raises(BadInput, match="is a run folder without packed/: let the run finish"):
        find_folder(run)
    folder.rename(run / "packed")
    assert find_folder(run) == run / "packed" and load_hf(run)[2] is None
    with pytest.raises(BadInput, match="it is a file: wanted a folder with config.json"):
        find_folder(run / "config.yaml")
    with pytest.raises(BadInput, match="it does not exist: wanted a folder with config.json"):
        find_folder(run / "no" / "such")
