"""TrainConfig: all options of a training run, in one flat list.

There are few options; the rest is derived. Values are checked here, once, before anything is
loaded. Checks that need the data, the model or the machine happen where those are first known.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .config_checks import check_objective, parse_json, require

DEFAULT_STEPS = 30
DEFAULT_EVAL_SHARE = 0.01
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
    """A training run. Lengths and sizes are in tokens unless stated otherwise; 16K means 16384."""

    # -- model --
    model: str = "demo"
    """"demo" (a 1.3M-parameter Llama), a checkpoint folder, a hub name, or a config.json."""
    random_init: bool = False
    """Start from random weights (see --seed) instead of the checkpoint's."""
    config_overrides: str | None = None
    """Model config entries to override, as JSON, for example '{"sliding_window": null}'."""
    dtype: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    """Compute dtype. auto: bf16 on CUDA, fp32 on CPU; master weights and reductions stay fp32."""
    attention: str | None = None
    """Attention kernel by name (see `hdp doctor`); None: chosen by device and dtype."""
    activation_checkpointing: bool = False
    """Save memory: keep only each layer's input and recompute the rest in backward."""
    compile: bool = False
    """Apply torch.compile to the layers, except attention; adds about a minute at startup."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Use Liger kernels in the layers. auto: if installed and applicable."""

    # -- objective --
    objective: Literal["sft", "dpo", "ipo", "rpo", "kto", "reward"] = "sft"
    """sft (and pre-training); dpo, ipo, rpo or reward (a reward model) on pairs of answers; kto on
    answers that are good or bad."""
    beta: float = 0.1
    """How closely DPO, IPO, RPO and KTO keep to the reference, which the run starts from."""
    rpo_alpha: float = 1.0
    """RPO: weight of the chosen answer's own likelihood."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank, such as 16, beside frozen weights; 0: train all weights."""
    lora_alpha: float | None = None
    """LoRA: the adapter is scaled by alpha / rank; None: 2 * rank."""
    lora_targets: str = "all-linear"
    """LoRA: all-linear (all but the head), or names of layers with commas, q_proj,v_proj."""

    # -- data --
    data: str | tuple[str, ...] = "stdlib"
    """"stdlib" (source files of Python's standard library), a folder, a .jsonl or .parquet file, a
    quoted glob such as "data/*.jsonl", or the name of a dataset on the hub; several, with weights,
    as in a.jsonl:0.7 b/:0.3, are a mixture."""
    mix_by: Literal["tokens", "sequences"] = "tokens"
    """What the weights of a mixture are shares of."""
    curriculum: Literal["none", "short-first"] = "none"
    """short-first: the first epoch goes from short to long sequences; later ones are shuffled."""
    context_schedule: str | None = None
    """Longest sequence from a step on, such as 0:4096,1000:16384; longer ones are deferred."""
    text_column: str = "text"
    """Column that holds the text in JSONL or Parquet rows; rows with `messages` are chats."""
    format: Literal["auto", "text", "chat", "sharegpt", "alpaca", "prompt", "tokens", "chosen"] = (
        "auto"
    )
    """What a row is; auto: by its columns (messages, conversations, instruction, prompt, ...)."""
    pattern: str | None = None
    """Which files to read from a folder, for example "*.md"."""
    subset: str | None = None
    """Configuration of a hub dataset, or of a folder whose README has several."""
    split: str = "train"
    """Split of a hub dataset (also train[:10%]), or of a folder whose file names tell splits."""
    tokenizer: str = "auto"
    """auto (the model's own; demo: bpe:4096), bpe:SIZE (trained on the data), bytes, or a path."""
    chat_template: str | None = None
    """Chat template: a Jinja file, or the name of a template that the tokenizer has."""
    chat_template_kwargs: str | None = None
    """Variables for the chat template, as JSON, for example '{"enable_thinking": false}'."""
    max_length: int | None = None
    """Maximum sequence length; None: as many tokens as all ranks hold together (stdlib: 2048, the
    rest in further pieces)."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What to do with documents longer than --max-length."""
    strict: bool = False
    """Fail on unreadable files instead of skipping and counting them."""
    cache_dir: str | None = None
    """Cache folder for tokens and tokenizers; None: ~/.cache/hdp."""

    # -- step --
    steps: int = DEFAULT_STEPS
    """Number of optimizer steps."""
    epochs: float | None = None
    """Passes over the data, instead of --steps; 0.5 is half of one."""
    batch_tokens: int = 8192
    """Global batch size: whole sequences up to this many tokens; a longer one is its own batch."""
    seed: int = 0
    """Seed for data order and random weights."""

    # -- evaluation --
    eval_data: str | None = None
    """Data for evaluation, named like --data; it is tokenized like the training data."""
    eval_split: str | None = None
    """Split of --eval-data; None: that of --split, or all of a single file."""
    eval_share: float | None = None
    """Share of the training documents to hold out instead of --eval-data; None: 0.01 if evaluation
    is asked for, else 0."""
    eval_every: int = 0
    """Steps between evaluations; 0: only at the end, if there is evaluation data."""
    eval_tokens: int | None = None
    """Evaluate on at most so many tokens, the same ones each time; None: all."""
    early_stop: int = 0
    """Stop after this many evaluations in a row without a new best loss; 0: never."""

    # -- parallelism --
    policy: Literal["hdp", "bytescale", "bytescale-naive", "static"] = "hdp"
    """hdp (this planner), bytescale or bytescale-naive (the paper's), or static (one ring size)."""
    cp_size: int | None = None
    """Ranks per sequence; required by --policy static, invalid otherwise."""
    max_tokens_per_rank: int | Literal["auto"] = 8192
    """Maximum tokens per microbatch on one rank: as many as its activation memory holds. auto:
    computed from the model and the free memory, with the arithmetic printed."""
    hdp_size: int | None = None
    """Number of ranks on the HDP axis; None: all."""
    offload_gib: float = 0.0
    """Host memory per rank for offloaded activations: long sequences need fewer ranks; 0: off."""
    cost: str | None = None
    """Cost model: a file from `hdp profile` or a preset such as h200; None: estimated from the
    model's shape."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if available, else CPU."""
    timeout_s: float = 600.0
    """Stop the run, naming the rank, if a rank makes no progress for this many seconds."""

    # -- optimizer --
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine or linear down to the end, constant, or wsd (constant, then down
    over the last --decay-share of the steps)."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of lr; unused by --schedule constant."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    decay_share: float = 0.2
    """Share of the steps over which --schedule wsd decays."""
    weight_decay: float = 0.1
    """Applied to matrices only, not to norms and biases."""
    beta1: float = 0.9
    """AdamW's decay rate of the gradient average."""
    beta2: float = 0.95
    """AdamW's decay rate of the squared-gradient average."""
    grad_clip: float = 1.0
    """Maximum global gradient norm; 0: no clipping."""
    optimizer: Literal["adamw", "apex", "transformer_engine"] = "adamw"
    """AdamW implementation: torch's fused kernel, or that of apex or Transformer Engine."""

    ema_decay: float = 0.0
    """Keep a moving average of the weights with this decay, such as 0.999; 0: none."""

    # -- output --
    run_dir: str = "runs/default"
    """Folder for checkpoints, metrics and the configuration."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Number of checkpoints to keep."""
    resume: bool = True
    """Continue from the newest checkpoint in run_dir, if any."""
    export_hf: str | None = None
    """Folder to write the final model to, in the format `from_pretrained` loads."""
    export_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the exported weights. auto: as in the checkpoint; for random weights, fp32."""
    export_ema: str | None = None
    """Folder to write the averaged model to, in the same format; requires --ema-decay."""
    export_adapter: str | None = None
    """Folder to write the LoRA adapter to, as peft loads it; --export-hf merges it instead."""
    export_best: bool = False
    """Export the weights of the best evaluation instead of the last ones."""
    log_every: int = 1
    """Steps between log lines."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for MFU; None: the data sheet's bf16 peak for known GPUs."""
    tensorboard: bool = True
    """Also write metrics for TensorBoard."""
    wandb: str | None = None
    """Also log to this project at Weights & Biases (pip install wandb)."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: keep the W&B run in run_dir/wandb for `wandb sync`; also done without a key."""
    trace_step: int | None = None
    """Step to trace: write planned and measured timelines as Perfetto JSON and PNG."""
    dry_run: bool = False
    """Print the resolved configuration as YAML, check data and model, plan a batch, and stop."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "max_tokens_per_rank", "keep_last", "log_every"):
            value = getattr(self, name)
            require(value == "auto" or value >= 1, name, value, "1 or more")
        not_negative = ("save_every", "warmup_steps", "weight_decay", "grad_clip", "seed")
        for name in (*not_negative, "offload_gib", "eval_every", "early_stop"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("max_length", "cp_size", "hdp_size", "trace_step", "eval_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more")
        for name, value in asdict(self).items():
            if isinstance(value, float):
                require(math.isfinite(value), name, value, "a finite number")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "in [0, 1)")
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "above 0")
        peak = self.peak_tflops
        require(peak is None or peak > 0, "peak_tflops", peak, "above 0")
        for name in ("min_lr_ratio", "decay_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        if self.export_ema is not None and not self.ema_decay:
            raise ValueError(
                f"--export-ema {self.export_ema} requires --ema-decay, such as 0.999: there is no "
                "average to export"
            )
        if self.export_ema is not None and self.export_ema == self.export_hf:
            raise ValueError(
                f"--export-hf and --export-ema are both {self.export_ema}; choose two folders"
            )
        check_objective(self)
        if not isinstance(self.model_entries, dict):
            raise ValueError(f"--config-overrides must be a JSON object: {self.config_overrides}")
        if not isinstance(self.template_variables, dict):
            given = self.chat_template_kwargs
            raise ValueError(f"--chat-template-kwargs must be a JSON object: {given}")
        if (self.policy == "static") != (self.cp_size is not None):
            raise ValueError(
                f"policy {self.policy!r} with cp_size {self.cp_size}: --policy static requires "
                "--cp-size, and no other policy takes it"
            )
        if self.offload_gib and (self.policy == "static" or self.activation_checkpointing):
            other = "--policy static" if self.policy == "static" else "--activation-checkpointing"
            raise ValueError(
                f"--offload-gib {self.offload_gib} cannot be combined with {other}: offload "
                "decides itself what to keep, offload or recompute, and static plans have no "
                "offload; drop one of the two"
            )
        if self.overlong != "error" and self.max_length is None:
            raise ValueError(
                f"--overlong {self.overlong} requires --max-length: the length above which it "
                "applies"
            )

        self._check_data_order()
        self._check_evaluation()

    def _check_data_order(self) -> None:
        if not isinstance(self.data, str):  # a list, as from JSON
            names = tuple(self.data)
            object.__setattr__(self, "data", names[0] if len(names) == 1 else names)
        if self.epochs is not None:
            require(0 < self.epochs < math.inf, "epochs", self.epochs, "above 0")
            if self.steps != DEFAULT_STEPS:
                raise ValueError(f"--steps {self.steps} and --epochs {self.epochs}: give only one")
        _ = self.context_limits  # raises if it cannot be parsed

    def _check_evaluation(self) -> None:
        share = self.eval_share
        require(share is None or 0 <= share < 1, "eval_share", share, "at least 0 and below 1")
        if self.eval_data is not None and share:
            raise ValueError(
                f"--eval-data {self.eval_data} and --eval-share {share}: give only one, as either "
                "is what to evaluate on"
            )
        if self.eval_split is not None and self.eval_data is None:
            raise ValueError(
                f"--eval-split {self.eval_split} without --eval-data: name the data that has the "
                "split"
            )
        if self.early_stop and not self.eval_every:
            raise ValueError(
                f"--early-stop {self.early_stop} requires --eval-every: it counts evaluations"
            )
        if self.eval_every and share == 0 and self.eval_data is None:
            raise ValueError(
                f"--eval-every {self.eval_every} with --eval-share 0: give --eval-data, or a share"
            )
        if self.export_best and not (self.export_hf and (self.eval_data or self.held_out_share)):
            raise ValueError(
                "--export-best requires --export-hf and evaluation: add --eval-data or --eval-every"
            )
        if self.eval_tokens is not None and not (self.eval_data or self.held_out_share):
            raise ValueError(
                f"--eval-tokens {self.eval_tokens} without evaluation: add --eval-data, "
                "--eval-share or --eval-every"
            )

    @property
    def held_out_share(self) -> float:
        """The share of the training documents that is held out for evaluation."""
        if self.eval_data is not None:
            return 0.0
        if self.eval_share is None:
            return DEFAULT_EVAL_SHARE if self.eval_every else 0.0
        return self.eval_share

    @property
    def context_limits(self) -> tuple[tuple[int, int], ...]:
        """The parsed --context-schedule: (steps before, maximum tokens of a sequence)."""
        limits = []
        for part in (self.context_schedule or "").split(",") if self.context_schedule else ():
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)([kKmM]?)\s*", part)
            if not match:
                raise ValueError(
                    f"--context-schedule {self.context_schedule!r}: {part!r} is not STEP:TOKENS; "
                    "write it like 0:4096,1000:16K"
                )
            scale = {"": 1, "k": 1024, "m": 1024**2}[match[3].lower()]
            limits.append((max(int(match[1]) - 1, 0), int(match[2]) * scale))
        steps, tokens = [step for step, _ in limits], [limit for _, limit in limits]
        if limits and (
            steps[0] != 0 or sorted(set(steps)) != steps or sorted(set(tokens)) != tokens
        ):
            raise ValueError(
                f"--context-schedule {self.context_schedule!r} must start at step 0, and its steps "
                "and tokens must ascend; write it like 0:4096,1000:16K"
            )
        return tuple(limits)

    @property
    def model_entries(self) -> dict[str, Any]:
        """The parsed --config-overrides."""
        return parse_json("config-overrides", self.config_overrides, '{"sliding_window": null}')

    @property
    def template_variables(self) -> dict[str, Any]:
        """The parsed --chat-template-kwargs."""
        return parse_json(
            "chat-template-kwargs", self.chat_template_kwargs, '{"enable_thinking": false}'
        )

    @property
    def tokens_per_rank(self) -> int:
        """max_tokens_per_rank as a number. A run's own configuration never says auto."""
        assert not isinstance(self.max_tokens_per_rank, str), "auto: see hdp/training/capacity.py"
        return self.max_tokens_per_rank

    def to_json(self) -> str:
        """All values as JSON; `train` writes this to run_dir/config.json."""
        return json.dumps(asdict(self), indent=2)
