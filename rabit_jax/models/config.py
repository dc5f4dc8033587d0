"""The decoder's settings; `config_hf` translates them from and to Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses

import jax

from rabit_jax.errors import BadInput

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu_tanh")
KEEPS = ("nothing", "products")  # of the activations of a block that is recomputed
MOST = 2**31 - 1  # of any size: token ids and positions are int32
MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies `w_j` are stretched beyond the trained context.

    `linear`: every `w_j / factor`. `llama3`: `w_j / factor` for wavelengths above
    `original_max_position / low_freq_factor`, `w_j` below `original_max_position /
    high_freq_factor`, and a linear blend between.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a decoder: sizes, what its blocks are made of, precision.

    The model families differ in these fields alone; the defaults are Llama's.

    Attributes:
      vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_hidden: sizes.
      rope_theta, rope_scaling: rotary base, and how its frequencies are stretched.
      norm_eps: epsilon of every norm.
      tied_head: the head is the embedding, transposed.
      attention_bias: q, k and v have a bias.
      o_bias: the projection out of attention has one.
      mlp_bias: gate, up and down have one.
      window: in local layers a query sees the last `window` keys, its own among them.
      local_layers: for each layer whether it is local; empty where none is.
      local_rope_theta: rotary base of local layers, which then have no scaling; None gives them
        that of the others.
      qk_norm: RMS norm over each head of q and k before the rotation (Qwen3, Gemma 3).
      post_norms: norms after attention and MLP too, before they are added (Gemma).
      norm_plus_one: norms multiply by `1 + scale` (Gemma).
      embed_scale: what the embedding is multiplied by on its way in (Gemma: sqrt(d_model)).
      activation: of the MLP's gate, `silu` or `gelu_tanh`.
      query_scalar: scores are `q k / sqrt(query_scalar)`; None takes head_dim.
      attention_softcap: `c tanh(scores / c)` before the mask (Gemma 2); None leaves them.
      final_softcap: the same of the logits.
      initializer_range: standard deviation of fresh weights.
      bos_id, eos_ids: special tokens.
      max_position: longest sequence.
      family: Hugging Face's `model_type`, which names the class that reads what we write.
      dtype: of the matrix products; parameters may be stored in another one.
      remat: recompute each block in the backward pass instead of keeping its activations.
      remat_keep: what is kept all the same: "nothing", or the results of matrix "products", which
        leaves the cheap operations to be recomputed.
      attention_block: queries per piece of attention over whole sequences; 0 takes all at once and
        makes the whole matrix of scores. The result is the same, see `attention_in_blocks`.

    Raises:
      BadInput: a size that is not a positive integer, heads that do not divide into groups, an
        odd `head_dim`, local layers that do not fit, an unknown `activation` or `dtype`.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_hidden: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    embed_scale: float = 1.0
    activation: str = "silu"
    query_scalar: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    max_position: int = 2048
    family: str = "llama"
    dtype: str = "float32"
    remat: bool = False
    remat_keep: str = "nothing"
    attention_block: int = 0

    def __post_init__(self) -> None:
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                      "d_hidden", "max_position"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"model {field} is {value!r}, wanted a positive integer")
            most = MOST_LAYERS if field == "n_layers" else MOST
            if value > most:
                raise BadInput(f"model {field} is {value}, wanted at most {most}")
        if self.n_heads % self.n_kv_heads:
            raise BadInput(f"model n_heads {self.n_heads} is not a multiple of n_kv_heads "
                           f"{self.n_kv_heads}; choose sizes where it is")
        if self.head_dim % 2:
            raise BadInput(f"model head_dim {self.head_dim} is odd, rotary embedding wants it even")
        if any(self.local_layers) and (self.window is None or self.window < 1):
            raise BadInput(f"model window is {self.window!r}, its local layers want a positive one")
        if self.local_layers and len(self.local_layers) != self.n_layers:
            raise BadInput(f"model local_layers has {len(self.local_layers)} entries, wanted one "
                           f"for each of {self.n_layers} layers")
        if self.activation not in ACTIVATIONS:
            raise BadInput(f"unsupported activation {self.activation!r}, wanted one of "
                           f"{', '.join(ACTIVATIONS)}")
        if self.attention_block < 0:
            raise BadInput(f"model attention_block is {self.attention_block}, wanted a number of "
                           "queries, or 0 for all at once")
        if self.remat_keep not in KEEPS:
            raise BadInput(f"unsupported remat_keep {self.remat_keep!r}, wanted one of "
                           f"{', '.join(KEEPS)}")
        if self.dtype not in DTYPES:
            raise BadInput(f"unsupported dtype {self.dtype!r}, wanted one of {', '.join(DTYPES)}")


def compute_dtype(config: ModelConfig) -> str:
    """The dtype of the matrix products on this machine: the config's, but on a CPU no float16.

    A CPU has no float16 arithmetic, and XLA compiles only some float16 products for it. float32
    holds every float16 value, so a float16 model computes in that.
    """
    on_cpu = jax.default_backend() == "cpu"
    return "float32" if on_cpu and config.dtype == "float16" else config.dtype
