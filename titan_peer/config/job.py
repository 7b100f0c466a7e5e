"""The whole job as dataclasses: defaults <- TOML file <- command line, checked before any work starts.

Every key is documented by the docstring below it; `--help` and docs/configuration.md are generated from these
docstrings. The range of a number stands in its type, and every section checks its other conditions in `problems`. The
keys of the architecture are in model_args.py, those of a data source in data_source.py, those of the optimizer in
optimizer.py. Names follow torchtitan where it has the same thing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tomli_w

from titan_peer.common.bounds import Range, Section
from titan_peer.common.errors import UserError
from titan_peer.config import version as config_version
from titan_peer.config.data_source import DataSource, source_name, source_problems
from titan_peer.config.optimizer import LRScheduler, Optimizer
from titan_peer.model_args import ModelArgs

YEAR = 365 * 24 * 3600  # seconds; the clocks of the C library do not reach far beyond a century


@dataclass
class Job(Section, name="job"):
    """What this run is and where it writes."""

    config_file: str = ""
    """TOML file with this job's keys; command-line values override it."""
    description: str = ""
    """Free text, shown in the banner."""
    dump_folder: str = "outputs"
    """Folder for everything the job writes: config.toml, metrics.jsonl, plots, checkpoints."""
    lock_wait_seconds: Annotated[int, Range(0, YEAR)] = 60
    """How long to wait for another job that is writing to dump_folder, for instance one that is about to end; at most
    half of parallelism.timeout_seconds."""
    print_config: bool = False
    """Print the resolved job as TOML on standard output and stop; on the command line only."""


@dataclass
class Model(ModelArgs):
    """Architecture and tokenizer."""

    tokenizer_path: str = "assets/tokenizer"
    """A tokenizer.json, a folder that holds one, a .tiktoken file, or "byte" for raw UTF-8 bytes."""


@dataclass
class Training(Section, name="training"):
    """Batches, precision and length of the run."""

    steps: Annotated[int, Range(1)] = 1000
    """Optimizer steps of the whole run, including those before a resume."""
    seq_len: Annotated[int, Range(1)] = 1024
    """Tokens of a packed sequence; at most model.max_seq_len."""
    local_batch_size: Annotated[int, Range(1)] = 8
    """Sequences per process and micro-batch."""
    global_batch_size: Annotated[int, Range(1, also=(-1,))] = -1
    """Sequences per optimizer step; gradients accumulate to reach it. -1: local_batch_size x data-parallel degree."""
    max_norm: Annotated[float, Range(0)] = 1.0
    """Clip the gradient to this norm; 0 only measures the norm."""
    skip_bad_steps: Annotated[int, Range(0)] = 0
    """Skip a step whose loss or gradient is not finite, with a line that says so: weights, moments and running statistics
    stay as they were. After more bad steps in a row than this the job ends, as it does at once with 0. The norm is then
    read before the update, for which a GPU waits."""
    bad_step_norm_factor: Annotated[float, Range(1, also=(0,))] = 0.0
    """With skip_bad_steps: skip also a step whose gradient norm is more than this many times the median of the last 128
    steps; 0: none."""
    ema_decay: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Keep an exponential moving average of the weights, in float32, with this decay per step: 0.999 averages over about
    1,000 steps. It does not change the training; validation measures it too, checkpoints hold it, and --ema of eval,
    generate, export and merge takes it. 0: none."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype of matrix products; master weights stay float32. auto: bfloat16 if the device supports it in
    hardware."""
    enable_cpu_offload: bool = False
    """Keep what FSDP shards (dense parameters, their gradients and moments) in host memory; expert tables, of which a
    step reads random rows, stay on the device."""
    loss_chunk_size: Annotated[int, Range(1)] = 1024
    """Tokens whose logits exist at the same time in the loss."""
    expert_balance_coeff: Annotated[float, Range(0)] = 0.0
    """Weight of an auxiliary loss that balances the use of experts: the KL divergence of a micro-batch's gate-weighted
    usage from the uniform distribution, summed over PEER layers. 0: none; 0.01 is a good start."""
    reinit_dead_experts_freq: Annotated[int, Range(0)] = 0
    """Steps between re-initialisations of sub-keys that no token has chosen since the last one, and of their unused
    experts, from used ones. 0: never."""
    gc_freq: Annotated[int, Range(0)] = 50
    """Run Python's garbage collector every this many steps and at no other time; 0 leaves it automatic."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.global_batch_size != -1 and self.global_batch_size % max(self.local_batch_size, 1):
            allowed = f"must be a multiple of training.local_batch_size = {self.local_batch_size}"
            found += self.problem("global_batch_size", allowed)
        if self.bad_step_norm_factor and not self.skip_bad_steps:
            found += self.problem("bad_step_norm_factor", "has no effect without training.skip_bad_steps")
        return found


@dataclass
class Data(Section, name="data"):
    """What is trained on."""

    sources: list[DataSource] = field(default_factory=list)
    """The sources of the mix: one [[data.sources]] table each."""
    mix_by: Literal["tokens", "documents"] = "tokens"
    """Whether the sources' weights are shares of the tokens or of the documents."""
    shuffle: bool = True
    """Shuffle documents in a new order every epoch, seeded by debug.seed."""
    shuffle_buffer_size: Annotated[int, Range(1)] = 1000
    """Documents per source and stream that are shuffled together; the order of larger parts is shuffled as well."""
    packing: Literal["concat", "best_fit", "pad"] = "concat"
    """How documents become sequences. concat: one after the other, cut every seq_len tokens; best_fit: combined where
    they fit whole, the rest padded; pad: one document per sequence."""
    add_bos: bool = True
    """Begin every document with the tokenizer's begin token, if it has one."""
    add_eos: bool = True
    """End every document with the tokenizer's end token, if it has one."""
    mask_document_borders: bool = True
    """The last token of a document has no label; false: its label is the first token of the next document."""
    num_streams: Annotated[int, Range(0, 2**16)] = 0
    """Shares of the data for parallel readers; processes x workers should divide it. It decides the order of the data
    and stays the same for the whole job. 0: as many as have enough documents each, up to 8, or up to processes x
    workers if that is more."""
    num_workers: Annotated[int, Range(0, 1024)] = 0
    """Worker processes per training process that read and tokenise; 0: the training process does it itself."""
    prefetch_factor: Annotated[int, Range(1, 1024)] = 2
    """Batches that a worker prepares ahead."""
    network_retries: Annotated[int, Range(0)] = 5
    """How often a failed request to a Hugging Face dataset is repeated, after 1, 2, 4 ... seconds."""

    def problems(self) -> list[str]:
        found = super().problems() + source_problems("data.sources", self.sources)
        if not self.sources:
            found += self.problem("sources", "at least one [[data.sources]] table with a path is needed")
        return found


@dataclass
class Validation(Section, name="validation"):
    """Held-out loss, perplexity and bits per byte."""

    enable: bool = False
    """Validate during training and at the end."""
    freq: Annotated[int, Range(1)] = 100
    """Steps between validations."""
    steps: Annotated[int, Range(1, also=(-1,))] = -1
    """Batches per validation and held-out set; -1 takes the whole set."""
    local_batch_size: Annotated[int, Range(1)] = 8
    """Sequences per process and batch."""
    sources: list[DataSource] = field(default_factory=list)
    """Held-out sets, each reported by its name: one [[validation.sources]] table each. Weights have no effect."""

    def problems(self) -> list[str]:
        found = super().problems() + source_problems("validation.sources", self.sources)
        if self.enable and not self.sources:
            found += self.problem("sources", "validation.enable needs a [[validation.sources]]")
        return found


@dataclass
class Evaluation(Section, name="evaluation"):
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
    """Folder with additional evals, laid out like the registry of the evals package."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks or groups, such as "sample_text_continuation" or "hellaswag" (extra: lm-eval)."""
    tasks_folder: str = ""
    """Folder with additional lm-eval task files."""
    limit: Annotated[int, Range(1, also=(-1,))] = -1
    """Samples per eval or task; -1 takes all."""
    batch_size: Annotated[int, Range(1)] = 16
    """Sequences per process and batch."""
    max_new_tokens: Annotated[int, Range(1)] = 32
    """Tokens per completion if an eval or task does not set it."""

    def problems(self) -> list[str]:
        found = super().problems() + source_problems("evaluation.perplexity", self.perplexity)
        names = [source_name(source) for source in self.perplexity]
        for name in sorted({name for name in names if names.count(name) > 1}):
            found.append(f"evaluation.perplexity: two sets are called {name!r}; give each a name of its own")
        if self.enable and not (self.perplexity or self.evals or self.tasks):
            found += self.problem("enable", "needs evaluation.evals, evaluation.tasks or [[evaluation.perplexity]]")
        return found


@dataclass
class Checkpoint(Section, name="checkpoint"):
    """Saving and resuming."""

    enable: bool = True
    """Save checkpoints, and resume from the newest complete one in the folder."""
    folder: str = "checkpoint"
    """Folder of the checkpoints inside job.dump_folder."""
    interval: Annotated[int, Range(1)] = 500
    """Steps between saves; the last step is always saved."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: copy the state to host memory and write it while training goes on; takes as much host memory as the
    process's part of the state."""
    keep_latest_k: Annotated[int, Range(0)] = 3
    """Checkpoints to keep; older ones are removed after a newer one is complete. 0 keeps all."""
    keep_every_n_steps: Annotated[int, Range(0)] = 0
    """Also keep checkpoints of steps that are multiples of this; 0: none."""
    load_step: Annotated[int, Range(0, also=(-1,))] = -1
    """Step to resume from; -1: the newest complete one, 0: start anew. Checkpoints newer than that step are renamed."""
    initial_load_path: str = ""
    """Where to start if this job has no checkpoint yet: another job's folder, of which the newest checkpoint is taken,
    or one of its checkpoints (a folder step-N)."""
    initial_load_model_only: bool = True
    """Take only the model from initial_load_path; false: also optimizer, step and data position."""
    exclude_from_loading: list[str] = field(default_factory=list)
    """What not to take from initial_load_path or from a load_step given by number: model, optimizer, ema, rng, dataloader,
    train_state or patterns of tensor names such as model.output.*; no effect on a resume with load_step = -1."""
    allow_changed: list[str] = field(default_factory=list)
    """What may differ from the checkpoint that the job starts from, although the weights were trained with it: keys of
    the model such as model.peer.gates, patterns of keys such as model.mla.*, and tokenizer."""
    last_save_model_only: bool = False
    """At the last step save only the model (and its average, with training.ema_decay), in export_dtype; such a checkpoint cannot be resumed."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the parameters in a model-only checkpoint."""


@dataclass
class Parallelism(Section, name="parallelism"):
    """How the job is spread over processes."""

    data_parallel_replicate_degree: Annotated[int, Range(1)] = 1
    """Replicas of the model, or, with a shard degree, of each shard group."""
    data_parallel_shard_degree: Annotated[int, Range(1, also=(-1,))] = -1
    """Processes over which parameters, gradients and optimizer states are sharded; -1: all remaining ones."""
    expert_parallel_degree: Annotated[int, Range(1)] = 1
    """Processes that hold the expert tables together, each a part; must divide the number of processes. 1: each process
    holds whole tables."""
    timeout_seconds: Annotated[int, Range(1, YEAR)] = 600
    """How long a collective may wait for a process before the job fails."""


@dataclass
class Comm(Section, name="comm"):
    """Communication between processes."""

    mode: Literal["default", "fake_backend"] = "default"
    """default: train; fake_backend: one process acts as rank 0 of NGPU x NNODES processes, runs one step without data,
    devices or weights, and prints the memory and communication it would take."""


@dataclass
class ActivationCheckpoint(Section, name="activation_checkpoint"):
    """Recompute activations in the backward pass instead of keeping them."""

    mode: Literal["none", "full", "selective", "selective_op"] = "none"
    """none; full: every block; selective: every n-th block; selective_op: every block, except the outputs of attention
    and of PEER's retrieval and experts, which are kept."""
    every_n_layers: Annotated[int, Range(1)] = 2
    """selective: recompute every n-th block."""


@dataclass
class Compile(Section, name="compile"):
    """torch.compile."""

    enable: bool = True
    """Compile every block (without graph breaks) and the loss."""


@dataclass
class Float8(Section, name="float8"):
    """float8 matrix products by torchao (extra: float8)."""

    enable: bool = False
    """Convert the linear layers of blocks whose dims are multiples of 16, never the head."""
    recipe_name: Literal["tensorwise", "rowwise"] = "tensorwise"
    """Granularity of the scales."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers whose name contains one of these are not converted, for instance attention.wo or layers.0."""
    enable_fsdp_float8_all_gather: bool = False
    """FSDP gathers weights in float8, with half the bytes of bfloat16 (tensorwise only)."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all gathered weights at once after each step (needs enable_fsdp_float8_all_gather)."""
    emulate: bool = False
    """Compute in higher precision but round as float8 does, for devices without float8."""

    def problems(self) -> list[str]:
        found = super().problems()
        gather, precompute = self.enable_fsdp_float8_all_gather, self.precompute_float8_dynamic_scale_for_fsdp
        if self.enable and gather and self.recipe_name != "tensorwise":
            allowed = f'needs float8.recipe_name = "tensorwise", not "{self.recipe_name}"'
            found += self.problem("enable_fsdp_float8_all_gather", allowed)
        if self.enable and precompute and not gather:
            allowed = "needs float8.enable_fsdp_float8_all_gather = true"
            found += self.problem("precompute_float8_dynamic_scale_for_fsdp", allowed)
        return found


@dataclass
class Metrics(Section, name="metrics"):
    """What is reported."""

    log_freq: Annotated[int, Range(1)] = 10
    """Steps between log lines and records in metrics.jsonl; the first and the last step are always logged."""
    detail_freq: Annotated[int, Range(0)] = 0
    """Steps between reports of gradient and weight norms and update-to-weight ratios of each parameter group, and of
    the largest attention logit of each block; 0: none."""
    heartbeat_seconds: Annotated[int, Range(0, YEAR)] = 60
    """Log a sign of life whenever nothing has been completed for this long; 0: never."""
    enable_tensorboard: bool = False
    """Also write TensorBoard files to <dump_folder>/tensorboard (extra: logging)."""
    enable_wandb: bool = False
    """Also log to Weights & Biases, in the project WANDB_PROJECT (extra: logging)."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: write files in <dump_folder>/wandb, which `wandb sync` uploads later."""
    wandb_group: str = ""
    """Group of the run in Weights & Biases."""
    wandb_checkpoints: Literal["none", "reference", "upload"] = "none"
    """Checkpoints as W&B artifacts: not at all, as a reference to their path, or uploaded."""
    log_expert_usage: bool = False
    """Count which experts of every PEER layer are used; report statistics, histograms and plots."""
    expert_usage_freq: Annotated[int, Range(1)] = 100
    """Steps between reports of expert usage; a report covers the steps since the last one."""


@dataclass
class Profiling(Section, name="profiling"):
    """Where time and memory go: traces and memory snapshots."""

    enable_profiling: bool = False
    """Write traces of profiler_active steps in every profile_freq steps; Perfetto opens them."""
    save_traces_folder: str = "profile_traces"
    """Folder of the traces inside job.dump_folder."""
    profile_freq: Annotated[int, Range(1)] = 10
    """Steps from one trace or memory snapshot to the next."""
    profiler_active: Annotated[int, Range(1)] = 1
    """Steps per trace."""
    profiler_warmup: Annotated[int, Range(0)] = 3
    """Steps before those in which the profiler already runs, to leave its start-up cost out of the trace."""
    enable_memory_snapshot: bool = False
    """CUDA only: every profile_freq steps, and when memory runs out, write what occupies the GPU's memory."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots inside job.dump_folder."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.profile_freq < self.profiler_active + self.profiler_warmup:
            allowed = f"{self.profiler_warmup} + {self.profiler_active}"
            allowed = f"must be at least profiling.profiler_warmup + profiling.profiler_active = {allowed}"
            found += self.problem("profile_freq", allowed)
        return found


@dataclass
class Debug(Section, name="debug"):
    """Reproducibility."""

    seed: Annotated[int, Range(0)] = 0
    """Seed of weights, data order and dropout."""
    deterministic: bool = False
    """Use only deterministic algorithms (slower on GPUs); CPU runs repeat bit for bit without it."""


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

    def problems(self) -> list[str]:
        """Every impossible value or combination of the job, a line each: of each section, then between sections."""
        found = [problem for f in dataclasses.fields(self) for problem in getattr(self, f.name).problems()]
        model, training = self.model, self.training
        if training.seq_len > model.max_seq_len:
            found += training.problem("seq_len", f"must be at most model.max_seq_len = {model.max_seq_len}")
        if self.optimizer.table_gradient != "sorted" and self.debug.deterministic:
            found += self.optimizer.problem("table_gradient", 'must be "sorted" with debug.deterministic = true')
        if self.float8.enable and training.local_batch_size * training.seq_len % 16:
            allowed = f"times training.seq_len = {training.seq_len} must be a multiple of 16 with float8.enable"
            found += training.problem("local_batch_size", allowed)
        experts, parts = model.peer.num_experts, self.parallelism.expert_parallel_degree
        if parts >= 1 and -(-experts // parts) * (parts - 1) >= experts:
            allowed = f"leaves a process without any of model.peer.num_experts = {experts:,}"
            found += self.parallelism.problem("expert_parallel_degree", allowed)
        if not model.has("peer"):
            of_experts: list[tuple[Section, str]] = [
                (self.metrics, "log_expert_usage"),
                (training, "expert_balance_coeff"),
                (training, "reinit_dead_experts_freq"),
            ]
            for section, key in of_experts:
                if getattr(section, key):
                    found += section.problem(key, "the model has no PEER layer")
        return found


def check(config: JobConfig) -> None:
    """Raise UserError listing every impossible value or combination of the job."""
    if found := config.problems():
        raise UserError("\n".join(found))
