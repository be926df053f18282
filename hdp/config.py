"""TrainConfig: everything that a training run can be told, in one flat list.

Few dials; the rest is derived. Values are checked here, once, before anything is loaded; what needs
the data, the model or the machine to be checked is checked where it is first known.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

DEMO_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1 << 20,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run. Lengths and sizes are in tokens unless named otherwise; 16K is 16384."""

    # -- model --
    model: str = "demo"
    """"demo" (a Llama of 1.3M parameters), a checkpoint's folder or hub name, or a config.json."""
    random_init: bool = False
    """Ignore the checkpoint's weights and start from a seeded random initialisation."""
    config_overrides: str | None = None
    """Entries of the model's config to change, as JSON, such as '{"sliding_window": null}'."""
    dtype: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    """Compute dtype; master weights and reductions stay fp32. auto: bf16 on CUDA, fp32 on CPU."""
    attention: str | None = None
    """Block kernel by name (see `hdp doctor`); chosen by device and dtype if not given."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for backward and recompute the rest."""
    compile: bool = False
    """torch.compile the layers around their attention; a minute at the start."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's kernels in the layers; auto: where they are installed and fit."""

    # -- data --
    data: str = "stdlib"
    """"stdlib" (sources of this Python's standard library), a folder, a .jsonl or .parquet file, a
    quoted pattern of files such as "data/*.jsonl", or a dataset's name on the hub."""
    text_column: str = "text"
    """Column of JSONL or Parquet rows that holds the text; rows with `messages` are chats."""
    pattern: str | None = None
    """Which files of a folder, such as "*.md"."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    tokenizer: str = "auto"
    """auto (the model's own; demo: bpe:4096), bpe:SIZE (trained on the data), bytes, or a path."""
    max_length: int | None = None
    """Longest sequence; None: what the ranks can hold together."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to documents over max_length: never anything that was not asked for."""
    strict: bool = False
    """Unreadable files are errors; otherwise they are skipped and counted."""
    cache_dir: str | None = None
    """Where tokens and tokenizers are cached; None: ~/.cache/hdp."""

    # -- step --
    steps: int = 100
    batch_tokens: int = 65536
    """Tokens of a global batch: whole sequences up to this; a longer one is a batch alone."""
    seed: int = 0

    # -- parallelism --
    policy: Literal["hdp", "bytescale", "bytescale-naive", "static"] = "hdp"
    cp_size: int | None = None
    """Ranks of every sequence under --policy static."""
    max_tokens_per_rank: int = 8192
    """Most tokens of one microbatch on one rank: what its activation memory holds."""
    hdp_size: int | None = None
    """Ranks of the HDP axis; None: all."""
    offload_gib: float = 0.0
    """Host memory per rank for activations, so that long sequences need fewer ranks; 0: none."""
    cost: str | None = None
    """File of `hdp profile`, or a preset such as h200; None: estimated from the model's shape."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = 600.0
    """A rank that shows no progress for so long is named and the run stops."""

    # -- optimizer --
    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    """The cosine ends at this share of lr."""
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    optimizer: Literal["adamw", "apex", "transformer_engine"] = "adamw"
    """AdamW by torch's fused kernel, or by that of a library."""

    # -- output --
    run_dir: str = "runs/default"
    save_every: int = 0
    """Steps between checkpoints; 0: none but at the end."""
    keep_last: int = 2
    resume: bool = True
    """Continue from the newest checkpoint in run_dir if there is one."""
    export_hf: str | None = None
    """Folder for a final model that `from_pretrained` loads."""
    log_every: int = 1
    peak_tflops: float | None = None
    """Peak of one device, for MFU; None: the data sheet's bf16 of known GPUs."""
    tensorboard: bool = True
    trace_step: int | None = None
    """Step whose planned and measured timelines are written (Perfetto JSON) and drawn (PNG)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "max_tokens_per_rank", "keep_last", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        not_negative = ("save_every", "warmup_steps", "weight_decay", "grad_clip", "seed")
        for name in (*not_negative, "offload_gib"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("max_length", "cp_size", "hdp_size", "trace_step"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "above 0")
        peak = self.peak_tflops
        _require(peak is None or peak > 0, "peak_tflops", peak, "above 0")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        if not isinstance(self.model_entries, dict):
            raise ValueError(f"--config-overrides must be a JSON object: {self.config_overrides}")
        if (self.policy == "static") != (self.cp_size is not None):
            raise ValueError(
                f"policy {self.policy!r} with cp_size {self.cp_size}: --cp-size belongs to "
                "--policy static, which needs it"
            )
        if self.offload_gib and (self.policy == "static" or self.activation_checkpointing):
            other = "--policy static" if self.policy == "static" else "--activation-checkpointing"
            raise ValueError(
                f"--offload-gib {self.offload_gib} with {other}: offload plans itself what is "
                "kept, sent and recomputed, and static plans have none"
            )
        if self.overlong != "error" and self.max_length is None:
            raise ValueError(
                f"--overlong {self.overlong} changes documents: say from which length on with "
                "--max-length"
            )

    @property
    def model_entries(self) -> dict[str, Any]:
        """What --config-overrides says."""
        try:
            return json.loads(self.config_overrides or "{}")
        except ValueError as error:
            raise ValueError(
                f"--config-overrides {self.config_overrides!r} is no JSON ({error}); it is like "
                "'{\"sliding_window\": null}'"
            ) from error

    def to_json(self) -> str:
        """All values; `train` leaves them in run_dir/config.json."""
        return json.dumps(asdict(self), indent=2)


def _require(fits: bool, name: str, value: Any, what: str) -> None:
    if not fits:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} must be {what}, got {value}")
