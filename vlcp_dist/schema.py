"""The sections of a configuration and what their values may be; `config.py` reads files into them."""

import json
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

PROMPT = (
    "Describe the physical appearance of the {class_name} in the image. "
    "Include details about its shape, posture, color, and any distinct features."
)
HardNet = Literal["convnet3", "convnet4", "convnet5", "convnet6", "resnetap10", "resnet18"]
SoftNet = Literal["resnet18", "resnet18-cifar", "resnet50", "efficientnet-b0", "mobilenet-v2"]
Net = HardNet | SoftNet
NETS = {"hard": typing.get_args(HardNet), "soft": typing.get_args(SoftNet)}
ONLY_HARD = ("width", "cutmix_probability", "crop_scale", "color_jitter", "lighting", "evaluations", "micro_batch_size")
ONLY_SOFT = ("teacher", "temperature", "factor")
StageName = Literal[
    "index",
    "caption",
    "pretrain",
    "encode",
    "pack",
    "finetune",
    "prototypes",
    "synthesize",
    "teachers",
    "soft_labels",
    "baselines",
    "evaluate",
]
DEEPSPEED = Path(__file__).parents[1] / "configs" / "deepspeed"  # of a checkout
ZERO1 = {"zero_optimization": {"stage": 1, "overlap_comm": True}}
# What `finetune.deepspeed` must leave to the trainer.
DEEPSPEED_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "torch_autocast",
)  # fmt: skip
REAL_METHODS = ("random", "k-center", "herding", "full")


def _knob(default: Any, **limits: Any) -> Any:
    """A field that changes speed or memory but not what a stage computes: left out of fingerprints."""
    return Field(default, json_schema_extra={"fingerprint": False}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Data(Section):
    """Where the real images are and how they are split."""

    source: Literal["digits", "imagefolder", "imagenet", "webdataset", "parquet"]
    path: str | None = Field(None, description="a local folder, or a URL such as s3://bucket/imagenet")
    classes: list[str] | Literal["imagenette", "imagewoof", "imageidc", "imagenet100"] | None = None
    class_names: str | dict[str, str] | None = Field(None, description="a listing file, or {id: name}")
    image_size: int = Field(32, ge=8, description="pixels of the bundled digits; other sources keep their own")
    validation: float = Field(0.1, ge=0, lt=1, description="share of the training images kept for choosing settings")
    test: float | None = Field(
        None, gt=0, lt=1, description="share held out when the source has no test split of its own"
    )
    limit_per_class: int | None = Field(None, ge=1, description="training images per class, for a trial")
    shard_size: int = Field(2000, ge=1, description="images per unit of work of caption and encode")
    max_pixels: int = Field(178_956_970, ge=1, description="larger images are refused as decompression bombs")


class Caption(Section):
    """Describe every image (docs/method.md, 1)."""

    captioner: Literal["llava", "measured"] = "llava"
    model: str = Field("llava-hf/llava-1.5-7b-hf", min_length=1)
    revision: str | None = None
    prompt: str = PROMPT
    max_new_tokens: int = Field(160, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 is greedy; the authors sample at 0.2, up to 1024 tokens")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch_size: int = _knob(32, ge=1)
    attention: Literal["sdpa", "flash_attention_2"] = _knob("sdpa")

    @model_validator(mode="after")
    def _prompt_names_the_class(self) -> "Caption":
        if "{class_name}" not in self.prompt:
            raise ValueError("caption.prompt must contain {class_name}")
        return self


class Pretrain(Section):
    """Make a small Stable Diffusion from the training images, for machines without pretrained weights."""

    vae_steps: int = Field(350, ge=1)
    vae_channels: list[Annotated[int, Field(ge=8, multiple_of=8)]] = Field(
        [16, 32, 32], min_length=1, max_length=3, description="each level but the last halves the image"
    )
    contrastive_steps: int = Field(150, ge=0)
    unet_channels: list[Annotated[int, Field(ge=8, multiple_of=8)]] = Field([32, 64], min_length=1, max_length=3)
    num_threads: int = Field(2, ge=1)


class Diffusion(Section):
    """The latent diffusion model: a local folder or a hub id in diffusers layout, or none when `pretrain` makes it."""

    model: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


class Encode(Section):
    """VAE latents of every image (docs/method.md, 3)."""

    image_size: int = Field(512, ge=8, multiple_of=8)
    resize: Literal["squash", "center"] = "squash"
    posterior: Literal["mean", "sample"] = "mean"
    horizontal_flip: bool = Field(False, description="also encode the mirrored image, for training")
    batch_size: int = _knob(32, ge=1)
    compile: bool = _knob(False, description="compile the encoder with torch.compile: minutes at first, then faster")


class Finetune(Section):
    """Train the U-Net on (latent, description) pairs with the noise-prediction loss (docs/method.md, 2, Eq. 1)."""

    epochs: int = Field(8, ge=1)
    batch_size: int = Field(32, ge=1, description="global batch, over all workers")
    learning_rate: float = Field(1e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    text_dropout: float = Field(0.0, ge=0, le=1, description="share of samples trained without text")
    snr_gamma: float | None = Field(None, gt=0, description="weigh the loss with min(SNR, gamma) / SNR, such as 5")
    lora_rank: int | None = Field(None, ge=1, description="train adapters of this rank on the attention (needs peft)")
    num_threads: int = Field(1, ge=1, description="CPU threads of one worker")
    strategy: Literal["deepspeed", "ddp"] = _knob("deepspeed")
    deepspeed: dict[str, Any] = _knob(ZERO1, description="zero1, zero2, zero2_offload, or the path of a JSON")
    workers: int = _knob(1, ge=1)
    elastic: bool = _knob(False, description="go on with fewer workers when one is lost and cannot be replaced")
    micro_batch_size: int = _knob(8, ge=1, description="samples of one worker that go through the U-Net at once")
    gradient_checkpointing: bool = _knob(True)
    channels_last: bool = _knob(True)
    compile: bool = _knob(False, description="torch.compile the U-Net: minutes at the start, faster steps")
    text_cache_gib: float = _knob(
        8.0, ge=0, description="text embeddings are kept where they fit in so many GiB, else token ids"
    )
    checkpoint_every: int = _knob(500, ge=1, description="steps; at the end of an epoch always")
    checkpoints_kept: int = _knob(2, ge=1)
    sample_images: int = _knob(4, ge=0, description="images at fixed descriptions after every epoch, for the report")
    trackers: list[Literal["tensorboard", "wandb"]] = _knob(["tensorboard"])

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _contents_of_its_file(cls, value: Any) -> Any:
        """Read where the configuration is read: the workers' machines need not have the file."""
        return _deepspeed_settings(value) if isinstance(value, str) else value

    @field_validator("deepspeed")
    @classmethod
    def _zero_1_or_2(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ours := [name for name in DEEPSPEED_OURS if name in value]:
            raise ValueError(f"{ours[0]} is set by fine-tuning itself; remove it from the DeepSpeed settings")
        stage = value.get("zero_optimization", {}).get("stage")
        if stage not in (1, 2):
            raise ValueError(
                f"zero_optimization.stage is {stage}; it must be 1 or 2: every worker holds the whole U-Net"
            )
        return value


class Prototypes(Section):
    """Outliers, image prototypes and text prototypes per class (docs/method.md, 4-6)."""

    backend: Literal["torch", "faiss", "cuml", "sklearn"] = Field(
        "torch", description="auto is torch: the fastest on a CPU and on a GPU, and it needs nothing else"
    )
    algorithm: Literal["lloyd", "minibatch"] = Field("lloyd", description="minibatch is D4M's")
    nested: bool = Field(
        False, description="start a larger IPC from the prototypes of the next smaller one made before it"
    )
    classes_per_unit: int = Field(1, ge=1, description="on a GPU some 8 classes together take little longer than one")
    n_neighbors: int = Field(10, ge=1)
    contamination: float = Field(0.1, ge=0, le=0.5)
    n_init: int = Field(10, ge=1)
    max_iter: int = Field(300, ge=1)
    beta: float = Field(0.7, gt=0, le=1)
    k: int = Field(30, ge=1)
    matching: Literal["word", "substring"] = "word"

    @field_validator("backend", mode="before")
    @classmethod
    def _auto_is_torch(cls, value: Any) -> Any:
        return "torch" if value == "auto" else value

    @model_validator(mode="after")
    def _backend_can(self) -> "Prototypes":
        if self.algorithm == "minibatch" and self.backend not in ("torch", "sklearn"):
            raise ValueError(f"prototypes.algorithm=minibatch needs backend torch or sklearn, not {self.backend}")
        if self.nested and (self.backend, self.algorithm) != ("torch", "lloyd"):
            raise ValueError("prototypes.nested needs backend torch and algorithm lloyd")
        return self


class Synthesize(Section):
    """Turn each pair of prototypes into an image (docs/method.md, 7, Eq. 6; strategies of Table 5)."""

    strategies: list[Literal["L", "L+FK", "GGS", "DCS", "DCS-shuffled"]] = Field(
        ["DCS"], min_length=1, json_schema_extra={"fingerprint": False}
    )
    strength: float = Field(0.7, gt=0, le=1)
    guidance_scale: float = Field(10.0, ge=1)
    num_inference_steps: int = Field(50, ge=1)
    scheduler: Literal["pndm", "ddim", "dpmsolver++"] = Field(
        "pndm", description="ddim, or dpmsolver++ with about 20 steps, are the faster ones"
    )
    negative_prompt: str = "cartoon, anime, painting"
    images_per_prototype: int = Field(1, ge=1, description="images of one prototype that differ by their noise")
    sentence_model: str | None = Field(
        None, description="for GGS: a text model of transformers, a folder or a hub id; without one, a fixed pattern"
    )
    sentence_model_revision: str | None = None
    image_size: int = Field(256, ge=8)
    soft_labels: SoftNet | None = Field(
        None,
        description="also store what a teacher says of every image: a net of the soft-label protocol",
        json_schema_extra={"fingerprint": False},  # the images are the same
    )
    batch_size: int = _knob(32, ge=1)
    compile: bool = _knob(False, description="torch.compile the U-Net: minutes at the start of every worker")
    prototypes_per_unit: int = Field(100, ge=1, description="classes are grouped into units of about this size")


def _default_nets(validated: dict[str, Any]) -> list[Net]:
    return ["resnet18"] if validated.get("protocol") == "soft" else ["resnetap10"]


def _default_size(validated: dict[str, Any]) -> int:
    return 224 if validated.get("protocol") == "soft" else 256


class Teacher(Section):
    """What labels the images of the soft-label protocol: a net like the student, trained on the real images."""

    checkpoints: dict[SoftNet, str] = Field(
        {},
        description="{net: folder in transformers' layout}, outputs named by class id; other nets are trained here",
        json_schema_extra={"fingerprint": False},  # each training is named by its teacher
    )
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    crop_scale: float = Field(0.25, gt=0, le=1)


class Evaluate(Section):
    """Train classifiers on the distilled images, test them on real ones (docs/method.md, 8). None: the published value.

    Several trainings share a GPU where engine.stages.evaluate.gpus_per_worker is a share of one.
    """

    protocol: Literal["hard", "soft"] = "hard"
    baselines: list[Literal["random", "k-center", "herding", "full"]] = Field(
        [], json_schema_extra={"fingerprint": False}
    )
    nets: list[Net] = Field(
        default_factory=_default_nets,
        min_length=1,
        json_schema_extra={"fingerprint": False},
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1, json_schema_extra={"fingerprint": False})
    split: Literal["validation", "test"] = "test"
    width: int | None = Field(None, ge=1, description="channels of a ConvNet, 128 when not given")
    image_size: int = Field(default_factory=_default_size, ge=8, description="256, or 224 of the soft protocol")
    epochs: Annotated[int, Field(ge=1)] | dict[int, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="the published schedule by IPC when not given; {ipc: epochs}, 0 for the full data",
        json_schema_extra={"fingerprint": False},  # each training is named by its own
    )
    batch_size: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    flip: float = Field(0.5, ge=0, le=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    cutmix_probability: float | None = Field(
        None, ge=0, le=1, description="hard: 1, or 0.5 up to 32 px, when not given"
    )
    crop_scale: float = Field(0.5, gt=0, le=1, description="hard: smallest share of the area kept by a random crop")
    color_jitter: float = Field(0.4, ge=0, description="hard")
    lighting: float = Field(0.1, ge=0, description="hard")
    evaluations: int = Field(100, ge=1, description="hard: how often the test split is looked at in a training")
    teacher: Teacher = Teacher()
    temperature: float = Field(20.0, gt=0, description="soft")
    factor: int | None = Field(
        None, ge=1, description="soft: shuffled patches a side; 2, or 1 up to 64 px, when not given"
    )
    micro_batch_size: int | None = _knob(
        None, ge=1, description="hard: images of a batch that go through a net at once"
    )
    checkpoint_every: float = _knob(120.0, ge=0, description="seconds of a training between checkpoints")

    @field_validator("nets", mode="after")
    @classmethod
    def _nets_of_the_protocol(cls, nets: list[Net], info: ValidationInfo) -> list[Net]:
        protocol = info.data.get("protocol", "hard")
        if others := [net for net in nets if net not in NETS[protocol]]:
            raise ValueError(
                f"{', '.join(others)} is no net of the {protocol}-label protocol, whose nets are "
                f"{', '.join(NETS[protocol])}; choose among them or the other evaluate.protocol"
            )
        return nets

    @model_validator(mode="after")
    def _only_settings_of_the_protocol(self) -> "Evaluate":
        for name in ONLY_SOFT if self.protocol == "hard" else ONLY_HARD:
            if name != "teacher" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"evaluate.{name} has no meaning in the {self.protocol}-label protocol; leave it out")
        return self


class Placement(Section):
    """What one worker (an actor) gets, and how many there are."""

    workers: int | None = Field(None, ge=1, description="as many as the cluster holds when not given")
    cpus_per_worker: int = Field(1, ge=1)
    gpus_per_worker: float | None = Field(None, ge=0, description="1 when the cluster has GPUs, when not given")
    memory_per_worker: float | None = Field(None, gt=0, description="GiB that the scheduler reserves")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="custom Ray resources")
    node_labels: dict[str, str] = Field({}, description="run only on nodes with these Ray labels")
    unit_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds, loading models included, after which a unit's worker is replaced; not in fine-tuning",
    )

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_or_a_share(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be a share of one GPU (up to 1) or a whole number of GPUs")
        return value


class Engine(Placement):
    """Where the work runs. Nothing here changes a result."""

    kind: Literal["ray", "serial"] = "ray"
    address: str | None = None
    max_retries: int = Field(2, ge=0, description="further attempts at a unit that raised an error")
    start_timeout: float = Field(300, gt=0, description="seconds to wait for the first worker of a stage")
    autoscaling: bool = Field(
        False, description="an autoscaler brings nodes: what does not fit yet is waited for, start_timeout seconds"
    )
    stages: dict[StageName, Placement] = Field({}, description="what differs for a stage: {caption: {workers: 8}}")

    @model_validator(mode="after")
    def _nodes_are_brought_for_what_is_asked(self) -> "Engine":
        if self.autoscaling and (self.workers is None or self.gpus_per_worker is None):
            raise ValueError(
                "engine.autoscaling needs engine.workers and engine.gpus_per_worker: nodes that are not there yet "
                "are brought for the workers that are asked for"
            )
        return self

    def placement(self, stage: str) -> Placement:
        """What a worker of this stage gets: what the stage sets itself, else what is set for all."""
        common = {name: getattr(self, name) for name in Placement.model_fields}
        own = self.stages.get(stage)  # type: ignore[call-overload]
        return Placement(**common | (own.model_dump(exclude_unset=True) if own else {}))


class Config(Section):
    """A whole run. `ipc` is a list: asking for one more later pays only for the difference."""

    root: str
    seed: int = Field(0, ge=0)
    ipc: list[Annotated[int, Field(ge=1)]] = Field([10], min_length=1, json_schema_extra={"fingerprint": False})
    data: Data
    caption: Caption = Caption()
    pretrain: Pretrain | None = None
    diffusion: Diffusion = Diffusion()
    encode: Encode = Encode()
    finetune: Finetune = Finetune()
    prototypes: Prototypes = Prototypes()
    synthesize: Synthesize = Synthesize()
    evaluate: Evaluate = Evaluate()
    engine: Engine = Engine()
    max_failed_samples: int = Field(0, ge=0, json_schema_extra={"fingerprint": False})
    sweep: dict[str, Annotated[list[Any], Field(min_length=2)]] | None = Field(
        None, min_length=1, max_length=1, description="one setting and its values: {prototypes.beta: [0.3, 0.5, 0.7]}"
    )
    published: dict[Net, dict[int, float]] = Field(
        {}, description="top-1 in % that was published, by net and IPC; the report sets it beside what was measured"
    )

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_its_kind(cls, value: Any) -> Any:
        """`engine: serial` is short for `engine: {kind: serial}`."""
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _cross_checks(self) -> "Config":
        if self.data.source != "digits" and not self.data.path:
            raise ValueError(f"data.path is needed for data.source: {self.data.source}")
        if (self.diffusion.model is None) == (self.pretrain is None):
            raise ValueError(
                "give either diffusion.model (a folder or hub id of a Stable Diffusion) "
                "or a pretrain section (a small one is then made from the training images)"
            )
        if self.pretrain and self.encode.image_size != 32:
            raise ValueError("encode.image_size must be 32 with a pretrain section: its model is made for 32 px")
        evaluate, synthesize = self.evaluate, self.synthesize
        if evaluate.protocol == "hard" and not synthesize.soft_labels and evaluate.teacher != Teacher():
            raise ValueError(
                "evaluate.teacher has no meaning in the hard-label protocol, unless there are synthesize.soft_labels; "
                "leave it out"
            )
        lists: dict[str, list[Any]] = {
            "ipc": self.ipc,
            "synthesize.strategies": list(synthesize.strategies),
            "evaluate.seeds": evaluate.seeds,
            "evaluate.nets": list(evaluate.nets),
            "evaluate.baselines": list(evaluate.baselines),
        }
        for name, values in lists.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds a value twice: {values}")
        if self.data.validation + (self.data.test or 0) >= 1:
            raise ValueError("data.validation and data.test leave no training images: their sum must stay below 1")
        if evaluate.split == "validation" and self.data.validation == 0:
            raise ValueError("evaluate.split=validation needs data.validation above 0")
        if int(synthesize.strength * synthesize.num_inference_steps) < 1:
            raise ValueError(
                f"synthesize.strength={synthesize.strength} of synthesize.num_inference_steps="
                f"{synthesize.num_inference_steps} leaves no step to run; raise one of them"
            )
        for net in evaluate.nets:
            if net.startswith("convnet") and evaluate.image_size < 2 ** int(net[-1]):
                raise ValueError(f"evaluate.image_size={evaluate.image_size} is too small for {net}")
        if isinstance(evaluate.epochs, dict):
            wanted = [*self.ipc, *([0] if "full" in evaluate.baselines else [])]
            missing = [ipc for ipc in wanted if ipc not in evaluate.epochs]
            if missing:
                raise ValueError(f"evaluate.epochs has no entry for {missing} (0 is the full data); add them")
        _check_global_batch(self.finetune.batch_size, self.finetune.workers)
        return self


def _check_global_batch(batch_size: int, workers: int) -> None:
    """Every worker takes as many samples of a batch as the others."""
    if batch_size % workers == 0:
        return
    below, above = batch_size // workers * workers, -(-batch_size // workers) * workers
    sizes = " or ".join(str(size) for size in (below, above) if size)
    fewer = next(n for n in range(workers, 0, -1) if batch_size % n == 0)
    more = next(n for n in range(workers, batch_size + 1) if batch_size % n == 0) if workers < batch_size else fewer
    counts = " or ".join(str(count) for count in sorted({fewer, more}))
    raise ValueError(
        f"finetune.batch_size {batch_size} is not divisible by finetune.workers {workers}: the nearest are "
        f"batch_size {sizes}, or workers {counts}"
    )


def _deepspeed_settings(name: str) -> Any:
    """What the file of a name (`configs/deepspeed/<name>.json`) or a path holds."""
    known = sorted(path.stem for path in DEEPSPEED.glob("*.json"))
    path = DEEPSPEED / f"{name}.json" if name in known else Path(name)
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{name} is none of {', '.join(known)} and cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
