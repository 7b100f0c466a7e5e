"""The whole job as dataclasses: defaults <- TOML file <- command line, checked before any work starts.

Every key is documented by the docstring under it; `--help` and docs/configuration.md are generated from these. The
architecture's keys live beside the model (`ModelArgs`), so that who changes it finds the key there, a data source's in
data_source.py; names follow torchtitan where it has the same thing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tomli_w

from titan_peer.common.bounds import Range, out_of_range
from titan_peer.common.errors import UserError
from titan_peer.config import version as config_version
from titan_peer.config.data_source import DataSource, source_name, source_problems
from titan_peer.model_args import ModelArgs

YEAR = 365 * 24 * 3600  # seconds; the C library's clocks end not far beyond a century


@dataclass
class Job:
    """What this run is and where it writes."""

    config_file: str = ""
    """TOML file with this job's keys; command-line values override it."""
    description: str = ""
    """Free text, shown in the banner."""
    dump_folder: str = "outputs"
    """Folder for everything the job writes: config.toml, metrics.jsonl, plots, checkpoints."""
    lock_wait_seconds: Annotated[int, Range(0, YEAR)] = 60
    """How long to wait for another job that is writing to dump_folder, such as one that is about to end; at most half of
    parallelism.timeout_seconds."""
    print_config: bool = False
    """Print the resolved job as TOML on standard output and stop; on the command line only."""


@dataclass
class Model(ModelArgs):
    """Architecture and tokenizer."""

    tokenizer_path: str = "assets/tokenizer"
    """A tokenizer.json, a folder that holds one, a .tiktoken file, or "byte" for raw UTF-8 bytes."""


@dataclass
class Training:
    """Batches, precision and length of the run."""

    steps: Annotated[int, Range(1)] = 1000
    """Optimizer steps of the whole run, those before a resume included."""
    seq_len: Annotated[int, Range(1)] = 1024
    """Tokens of a packed sequence; at most model.max_seq_len."""
    local_batch_size: Annotated[int, Range(1)] = 8
    """Sequences a process takes at a time."""
    global_batch_size: Annotated[int, Range(1, also=(-1,))] = -1
    """Sequences an optimizer step; gradients accumulate to reach it. -1: local_batch_size x data-parallel degree."""
    max_norm: Annotated[float, Range(0)] = 1.0
    """Clip the gradient to this norm; 0 only measures it."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype of matmuls; master weights stay float32. auto: bfloat16 where the device has it in hardware."""
    enable_cpu_offload: bool = False
    """Keep what FSDP shards (dense parameters, their gradients and moments) in the host's memory; expert tables, of which
    a step reads rows at random, stay on the device."""
    loss_chunk_size: Annotated[int, Range(1)] = 1024
    """Tokens whose logits exist at a time in the loss."""
    expert_balance_coeff: Annotated[float, Range(0)] = 0.0
    """Weight of an auxiliary loss that evens the use of experts: the KL divergence from uniform of a micro-batch's
    gate-weighted usage, summed over PEER layers. 0: none; 0.01 is a start."""
    reinit_dead_experts_freq: Annotated[int, Range(0)] = 0
    """Steps between re-initialisations of sub-keys that no token chose since the last one, and of their unused experts,
    from used ones. 0: never."""
    gc_freq: Annotated[int, Range(0)] = 50
    """Run Python's garbage collector every so many steps and at no other time; 0 leaves it automatic."""


@dataclass
class Optimizer:
    """AdamW; a group of its own for expert tables."""

    lr: Annotated[float, Range(0)] = 1e-3
    """Peak learning rate."""
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Range(0, above=True)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Decoupled weight decay of matrices; norms, gains and biases have none."""
    expert_lr_factor: Annotated[float, Range(0)] = 1.0
    """Learning rate of expert tables, as a factor of lr."""
    expert_weight_decay: Annotated[float, Range(0)] = 0.0
    """Decoupled weight decay of expert tables."""
    expert_update: Literal["rowwise", "dense"] = "rowwise"
    """rowwise: a step touches only the rows of the experts used (the moments of others do not decay meanwhile); dense:
    torch's AdamW over whole tables."""
    expert_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the moments of expert tables (rowwise only); bfloat16 is written with stochastic rounding."""
    expert_compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the tables that forward and backward read (rowwise only). bfloat16: copies, half the bytes of every row
    read, beside the float32 tables that the optimizer updates and checkpoints hold."""
    expert_second_moment: Literal["element", "row"] = "element"
    """element: one second moment a weight; row: one an expert's table row (rowwise only)."""
    table_gradient: Literal["sorted", "atomic", "fastest"] = "sorted"
    """How GPU kernels sum dense gradients of expert tables and sub-keys. sorted: each row once, in one order, repeatable;
    atomic: as the pairs come; fastest: what `titan-peer tune` measured to be faster, sorted without such a measurement."""


@dataclass
class LRScheduler:
    """Warmup, stable, decay."""

    warmup_steps: Annotated[int, Range(0)] = 100
    """Steps of linear warmup from 0 to lr."""
    decay_ratio: Annotated[float, Range(0, 1)] = 0.2
    """Share of training.steps, at the end, over which the rate decays; what is left between is constant."""
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay."""
    min_lr_factor: Annotated[float, Range(0, 1)] = 0.0
    """Rate at the last step, as a factor of lr."""


@dataclass
class Data:
    """What is trained on."""

    sources: list[DataSource] = field(default_factory=list)
    """The streams of the mix: one [[data.sources]] table each."""
    mix_by: Literal["tokens", "documents"] = "tokens"
    """What the sources' weights are parts of."""
    shuffle: bool = True
    """Shuffle documents, anew every epoch; seeded by debug.seed."""
    shuffle_buffer_size: Annotated[int, Range(1)] = 1000
    """Documents of a source and stream that are shuffled together; the order of larger parts is shuffled as well."""
    packing: Literal["concat", "best_fit", "pad"] = "concat"
    """How documents become sequences. concat: one after the other, cut every seq_len tokens; best_fit: together where
    they fit whole, the rest padded; pad: one a sequence."""
    add_bos: bool = True
    """Begin every document with the tokenizer's begin token, if it has one."""
    add_eos: bool = True
    """End every document with the tokenizer's end token, if it has one."""
    mask_document_borders: bool = True
    """The last token of a document has nothing to predict; false: it is to predict the first one of the next document."""
    num_streams: Annotated[int, Range(0, 2**16)] = 0
    """Parallel readers' shares of the data; processes x workers should divide it. It decides the order of the data and
    stays what it is over a job. 0: as many as have enough documents each, up to 8 or, with more than 8 processes x workers, as
    many as those."""
    num_workers: Annotated[int, Range(0, 1024)] = 0
    """Worker processes, of each training process, that read and tokenise; 0: the training process does it itself."""
    prefetch_factor: Annotated[int, Range(1, 1024)] = 2
    """Batches that a worker makes ahead."""
    network_retries: Annotated[int, Range(0)] = 5
    """Times that a failed request to a Hugging Face dataset is repeated, after 1, 2, 4 ... seconds."""


@dataclass
class Validation:
    """Held-out loss, perplexity and bits per byte."""

    enable: bool = False
    """Validate during training and at the end."""
    freq: Annotated[int, Range(1)] = 100
    """Steps between validations."""
    steps: Annotated[int, Range(1, also=(-1,))] = -1
    """Batches of a validation, of each held-out set; -1 takes the whole set."""
    local_batch_size: Annotated[int, Range(1)] = 8
    """Sequences a process takes at a time."""
    sources: list[DataSource] = field(default_factory=list)
    """Held-out sets, each reported by its name: one [[validation.sources]] table each. Its weight has no meaning."""


@dataclass
class Evaluation:
    """Evaluations of the current weights during training: perplexity, OpenAI evals, lm-eval tasks."""

    enable: bool = False
    """Evaluate every freq steps and at the end."""
    freq: Annotated[int, Range(1)] = 1000
    """Steps between evaluations."""
    perplexity: list[DataSource] = field(default_factory=list)
    """Held-out sets: one [[evaluation.perplexity]] table each, reported under its name."""
    evals: list[str] = field(default_factory=list)
    """OpenAI evals by their names in the registry, such as "test-match" (extra: evals)."""
    evals_registry: str = ""
    """Folder of further evals, laid out as the registry of the evals package."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks or groups, such as "sample_text_continuation" or "hellaswag" (extra: lm-eval)."""
    tasks_folder: str = ""
    """Folder of further lm-eval task files."""
    limit: Annotated[int, Range(1, also=(-1,))] = -1
    """Samples of an eval or task; -1 takes all."""
    batch_size: Annotated[int, Range(1)] = 16
    """Sequences a process takes at a time."""
    max_new_tokens: Annotated[int, Range(1)] = 32
    """Tokens of a completion where an eval or task does not say."""


@dataclass
class Checkpoint:
    """Saving and resuming."""

    enable: bool = True
    """Save checkpoints, and resume from the newest complete one in the folder."""
    folder: str = "checkpoint"
    """Folder of the checkpoints inside job.dump_folder."""
    interval: Annotated[int, Range(1)] = 500
    """Steps between saves; the last step is always saved."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: copy the state to host memory and write it beside the training; takes as much host memory as a process'
    part of the state."""
    keep_latest_k: Annotated[int, Range(0)] = 3
    """Checkpoints kept; older ones are removed after a newer one is complete. 0 keeps all."""
    keep_every_n_steps: Annotated[int, Range(0)] = 0
    """Checkpoints of steps that are multiples of this are kept besides the latest; 0: none."""
    load_step: Annotated[int, Range(0, also=(-1,))] = -1
    """Step to resume from; -1: the newest complete one, 0: start anew. Newer checkpoints than that step are renamed."""
    initial_load_path: str = ""
    """Another job's folder, whose newest checkpoint is taken, or one of its checkpoints (a folder step-N), to start from
    where this job has no checkpoint yet."""
    initial_load_model_only: bool = True
    """Of initial_load_path take the model only; false: optimizer, step and data position too."""
    exclude_from_loading: list[str] = field(default_factory=list)
    """What is not taken from initial_load_path or a load_step given by number: model, optimizer, rng, dataloader,
    train_state or patterns of tensor names such as model.output.*; no part in a resume by load_step = -1."""
    allow_changed: list[str] = field(default_factory=list)
    """What may be other than in the checkpoint that the job starts from, although the weights have learnt with it: keys of
    the model such as model.peer.gates, patterns of them such as model.mla.*, and tokenizer."""
    last_save_model_only: bool = False
    """Save only the model at the last step, in export_dtype; such a checkpoint cannot be resumed."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the parameters in a model-only checkpoint."""


@dataclass
class Parallelism:
    """How the job is spread over processes."""

    data_parallel_replicate_degree: Annotated[int, Range(1)] = 1
    """Replicas of the model (with a shard degree: of each shard group)."""
    data_parallel_shard_degree: Annotated[int, Range(1, also=(-1,))] = -1
    """Processes over which parameters, gradients and optimizer states are sharded; -1: all that are left."""
    expert_parallel_degree: Annotated[int, Range(1)] = 1
    """Processes that together hold the expert tables, each a part; must divide the number of processes. 1: each process
    holds them whole."""
    timeout_seconds: Annotated[int, Range(1, YEAR)] = 600
    """How long a collective may wait for a process before the job ends."""


@dataclass
class Comm:
    """Communication between processes."""

    mode: Literal["default", "fake_backend"] = "default"
    """default: train; fake_backend: one process plays rank 0 of as many as were asked for (NGPU x NNODES), makes one step
    without data, devices or weights, and prints the memory and the communication it would take."""


@dataclass
class ActivationCheckpoint:
    """Recompute activations in the backward pass instead of keeping them."""

    mode: Literal["none", "full", "selective", "selective_op"] = "none"
    """none; full: every block; selective: every n-th block; selective_op: every block, but the outputs of attention and
    of PEER's retrieval and experts are kept."""
    every_n_layers: Annotated[int, Range(1)] = 2
    """selective: recompute every n-th block."""


@dataclass
class Compile:
    """torch.compile."""

    enable: bool = True
    """Compile every block (without graph breaks) and the loss."""


@dataclass
class Float8:
    """float8 matmuls by torchao (extra: float8)."""

    enable: bool = False
    """Convert the linear layers of blocks whose dims are multiples of 16; never the head."""
    recipe_name: Literal["tensorwise", "rowwise"] = "tensorwise"
    """Granularity of the scales."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers whose name contains one of these stay as they are, for instance attention.wo or layers.0."""
    enable_fsdp_float8_all_gather: bool = False
    """FSDP gathers weights in float8, half the bytes of bfloat16 (tensorwise only)."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Make all gathered weights' scales at once after each step (needs enable_fsdp_float8_all_gather)."""
    emulate: bool = False
    """Compute in higher precision but round as float8 does: for devices without it."""


@dataclass
class Metrics:
    """What is reported."""

    log_freq: Annotated[int, Range(1)] = 10
    """Steps between log lines and records in metrics.jsonl; the first and last step are always logged."""
    heartbeat_seconds: Annotated[int, Range(0, YEAR)] = 60
    """Log a sign of life whenever nothing has ended for so long; 0: never."""
    enable_tensorboard: bool = False
    """Also write TensorBoard files to <dump_folder>/tensorboard (extra: logging)."""
    enable_wandb: bool = False
    """Also log to Weights & Biases, project by WANDB_PROJECT (extra: logging)."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: to files in <dump_folder>/wandb that `wandb sync` sends later."""
    wandb_group: str = ""
    """Group of the run in Weights & Biases."""
    wandb_checkpoints: Literal["none", "reference", "upload"] = "none"
    """Checkpoints as W&B artifacts: not at all, as a reference to where they lie, or uploaded."""
    log_expert_usage: bool = False
    """Count which experts of every PEER layer are used; report statistics, histograms and plots."""
    expert_usage_freq: Annotated[int, Range(1)] = 100
    """Steps between reports of expert usage; a report is of the steps since the last."""


@dataclass
class Profiling:
    """Where time and memory go: traces and memory snapshots."""

    enable_profiling: bool = False
    """Write traces of profiler_active steps in every profile_freq; they open in Perfetto."""
    save_traces_folder: str = "profile_traces"
    """Folder of the traces inside job.dump_folder."""
    profile_freq: Annotated[int, Range(1)] = 10
    """Steps from one trace, or memory snapshot, to the next."""
    profiler_active: Annotated[int, Range(1)] = 1
    """Steps in a trace."""
    profiler_warmup: Annotated[int, Range(0)] = 3
    """Steps before those, in which the profiler runs but its own start-up cost is thrown away."""
    enable_memory_snapshot: bool = False
    """CUDA only: every profile_freq steps, and when memory runs out, write what holds the GPU's memory."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots inside job.dump_folder."""


@dataclass
class Debug:
    """Reproducibility."""

    seed: Annotated[int, Range(0)] = 0
    """Seed of weights, data order and dropout."""
    deterministic: bool = False
    """Only deterministic algorithms (slower on GPUs); CPU runs repeat bit for bit without it."""


@dataclass
class JobConfig:
    """A training job.

    Examples:
      ./run_train.sh --job.config_file train_configs/debug_model.toml
      ./run_train.sh --job.config_file train_configs/peer_1m.toml --training.steps 1000 --compile.enable false
    """

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    parallelism: Parallelism = field(default_factory=Parallelism)
    comm: Comm = field(default_factory=Comm)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    float8: Float8 = field(default_factory=Float8)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    debug: Debug = field(default_factory=Debug)

    def to_toml(self) -> str:
        """The resolved job as a TOML file that reproduces it."""
        return tomli_w.dumps({config_version.KEY: config_version.CONFIG_VERSION, **dataclasses.asdict(self)})


# --------------------------------------------------------------------------------------------------------------------
# What the types cannot say


def check(config: JobConfig) -> None:
    """Raise UserError listing every impossible value or combination of the job."""
    # a data source's numbers are looked at with its other keys, the model's with its shape
    found = [problem for problem in out_of_range(config, "") if not problem.startswith("model.")]
    found += config.model.problems()

    def require(ok: bool, key: str, allowed: str) -> None:
        section, name = key.split(".")
        if not ok:
            found.append(f"{key} = {getattr(getattr(config, section), name)}: {allowed}")

    training = config.training
    require(
        training.seq_len <= config.model.max_seq_len,
        "training.seq_len",
        f"must be at most model.max_seq_len = {config.model.max_seq_len}",
    )
    require(
        training.global_batch_size == -1 or training.global_batch_size % max(training.local_batch_size, 1) == 0,
        "training.global_batch_size",
        f"must be a multiple of training.local_batch_size = {training.local_batch_size}",
    )
    profiling = config.profiling
    require(
        profiling.profile_freq >= profiling.profiler_active + profiling.profiler_warmup,
        "profiling.profile_freq",
        f"must be at least profiling.profiler_warmup + profiling.profiler_active = "
        f"{profiling.profiler_warmup} + {profiling.profiler_active}",
    )
    found += source_problems("data", config.data.sources) + source_problems("validation", config.validation.sources)
    require(bool(config.data.sources), "data.sources", "at least one [[data.sources]] table with a path is needed")
    if config.validation.enable:
        require(
            bool(config.validation.sources), "validation.sources", "validation.enable needs a [[validation.sources]]"
        )
    has_peer = any(config.model.has_peer(layer) for layer in range(config.model.n_layers))
    held_out = source_problems("evaluation.perplexity", config.evaluation.perplexity)
    found += [problem.replace("perplexity.sources", "perplexity") for problem in held_out]
    names = [source_name(source) for source in config.evaluation.perplexity]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"evaluation.perplexity: two sets are called {name!r}; give each a name of its own")
    if config.evaluation.enable:
        named = config.evaluation.perplexity or config.evaluation.evals or config.evaluation.tasks
        require(
            bool(named), "evaluation.enable", "needs evaluation.evals, evaluation.tasks or [[evaluation.perplexity]]"
        )
    require(
        config.optimizer.table_gradient == "sorted" or not config.debug.deterministic,
        "optimizer.table_gradient",
        'must be "sorted" with debug.deterministic = true',
    )
    for key in ("metrics.log_expert_usage", "training.expert_balance_coeff", "training.reinit_dead_experts_freq"):
        section, name = key.split(".")
        require(has_peer or not getattr(getattr(config, section), name), key, "the model has no PEER layer")
    if config.optimizer.expert_update == "dense":
        for key in ("expert_moment_dtype", "expert_compute_dtype", "expert_second_moment"):
            default = getattr(Optimizer(), key)
            require(
                getattr(config.optimizer, key) == default,
                f"optimizer.{key}",
                f'needs optimizer.expert_update = "rowwise"; dense allows only "{default}"',
            )
    float8 = config.float8
    if float8.enable:
        tokens = training.local_batch_size * training.seq_len
        require(
            tokens % 16 == 0,
            "training.local_batch_size",
            f"times training.seq_len = {training.seq_len} must be a multiple of 16 with float8.enable",
        )
        require(
            not float8.enable_fsdp_float8_all_gather or float8.recipe_name == "tensorwise",
            "float8.enable_fsdp_float8_all_gather",
            f'needs float8.recipe_name = "tensorwise", not "{float8.recipe_name}"',
        )
        require(
            not float8.precompute_float8_dynamic_scale_for_fsdp or float8.enable_fsdp_float8_all_gather,
            "float8.precompute_float8_dynamic_scale_for_fsdp",
            "needs float8.enable_fsdp_float8_all_gather = true",
        )
    experts, parts = config.model.peer.num_experts, config.parallelism.expert_parallel_degree
    require(
        parts < 1 or -(-experts // parts) * (parts - 1) < experts,
        "parallelism.expert_parallel_degree",
        f"leaves a process without any of model.peer.num_experts = {experts:,}",
    )
    if found:
        raise UserError("\n".join(found))
