"""Every setting of the project, as frozen dataclasses.

Defaults live here and nowhere else. `configs/*.py` build an `ml_collections.ConfigDict`; `read` (`muse.strict`) makes
the dataclasses below of it, or of the JSON of a release, and refuses unknown keys and wrong types. The paper's values
are the defaults where the paper gives one (Muse, tables 4 and 5); docs/design.md says what was chosen elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from muse.errors import UserError, nearest
from muse.strict import read

Dtype = Literal['float32', 'bfloat16']
Remat = Literal['none', 'dots', 'full']  # what the backward pass makes again: nothing, all but products, everything
# 'auto': the chip's own attention where it fits; 'fused': this project's for GPUs where it fits, else as 'auto'.
Backend = Literal['auto', 'xla', 'cudnn', 'splash', 'fused']
MaskSchedule = Literal['cosine', 'linear', 'square', 'cubic', 'root']
GuidanceSchedule = Literal['constant', 'linear', 'cosine']
Order = Literal['confidence', 'halton', 'random']


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """VQGAN tokenizer (§2.2, Table 5). The downsampling factor is 2^(len(channel_mult) - 1)."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    decoder_channels: int | None = None  # None: as the encoder's; 256 for the larger decoder of appendix A.2
    decoder_num_res_blocks: int | None = None  # None: as the encoder's; 4 for the larger decoder
    quantizer: Literal['vq', 'fsq', 'lfq'] = 'vq'  # learned codes; rounded coordinates; signs of coordinates
    codebook_size: int = 8192
    code_dim: int = 256
    levels: tuple[int, ...] = ()  # 'fsq' only: steps of each coordinate; their product is codebook_size
    l2_normalize: bool = False  # compare codes on the unit sphere: fewer dead codes at small code_dim
    dtype: Dtype = 'float32'

    @property
    def factor(self) -> int:
        """Pixels a token covers along one side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class PublicVQConfig:
    """A published VQGAN (taming-transformers, latent diffusion, diffusers' VQModel): see `tools/import_tokenizer.py`.

    Not the paper's: groups of its norms, attention and the padding of its strides are its own. Levels are listed from
    full resolution to the coarsest; the defaults are aMUSEd's.
    """

    kind: Literal['public']
    level_channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    num_res_blocks: int = 2  # the decoder has one more a level
    encoder_attention: tuple[bool, ...] = (False,) * 5  # attention after each block of the level
    decoder_attention: tuple[bool, ...] = (False,) * 5
    middle_attention: bool = False
    latent_dim: int = 64  # between the encoder and the 1x1 convolution into the code space
    codebook_size: int = 8192
    code_dim: int = 64
    norm_groups: int = 32
    spatial_norm: bool = False  # the decoder's norms are scaled and shifted by the codes (MoVQ)
    dtype: Dtype = 'float32'

    @property
    def factor(self) -> int:
        """Pixels a token covers along one side."""
        return 2 ** (len(self.level_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """T5 encoder (v1.1 gated, or 1.0 with `gated=False`). Defaults are T5-v1.1-XXL, the paper's (§2.1)."""

    vocab_size: int = 32128
    width: int = 4096
    mlp_dim: int = 10240
    head_dim: int = 64
    heads: int = 64
    layers: int = 24
    gated: bool = True  # True: tanh-GELU gate times linear (v1.1); False: ReLU (1.0)
    relative_buckets: int = 32
    relative_max_distance: int = 128
    max_length: int = 127  # tokens incl. </s>: null + text is then 128 in the cross-attention
    remat: Remat = 'none'
    unroll: int = 1  # layers a scan step; `layers` unrolls the whole stack
    attention: Literal['xla', 'cudnn'] = 'xla'  # splash knows no position bias
    dtype: Dtype = 'float32'


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Base masked transformer (§2.3, Table 4). Defaults are the paper's 3B."""

    codebook_size: int = 8192
    grid: tuple[int, int] = (16, 16)  # token rows and columns trained on
    width: int = 2048
    mlp_dim: int = 8192
    heads: int = 16
    layers: int = 48
    text_width: int = 4096
    text_length: int = 127
    remat: Remat = 'dots'
    unroll: int = 1  # layers a scan step; `layers` unrolls the whole stack
    attention: Backend = 'auto'
    dtype: Dtype = 'float32'


@dataclass(frozen=True, kw_only=True)
class SuperresConfig:
    """Super-resolution transformer (§2.4, Table 6): low-res tokens and text → high-res ones. Defaults: Table 6."""

    codebook_size: int = 8192
    grid: tuple[int, int] = (64, 64)  # high-res token rows and columns trained on; multiples of `block` and `low_grid`
    low_codebook_size: int = 8192
    low_grid: tuple[int, int] = (16, 16)
    block: int = 8  # tokens along a side of a local block (multi-axis attention)
    width: int = 1024
    mlp_dim: int = 4096
    heads: int = 16  # half of them attend within blocks, half across
    layers: int = 32
    low_layers: int = 16  # self-attention layers over the low-res tokens; 0: only their embedding is read
    text_width: int = 4096
    text_length: int = 127
    remat: Remat = 'dots'
    unroll: int = 1  # layers a scan step; `layers` unrolls the whole stack
    attention: Backend = 'auto'
    dtype: Dtype = 'float32'


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Parallel decoding (§2.7, §2.8): the defaults a release ships, which every call may override."""

    steps: int = 24
    guidance_scale: float = 3.0  # t of §2.7: logits = (1+t)·conditional − t·unconditional; 0 is no guidance
    # From 0 at the first step to t at the last, in a line (the paper's) or half a cosine wave; or t throughout.
    guidance_schedule: GuidanceSchedule = 'linear'
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # only from here to there: shares of the way, both included
    temperature: float = 1.0  # at the first step; 0 takes the most likely token
    final_temperature: float | None = None  # at the last step, in a line from the first; None: as at the first
    choice_temperature: float = 4.5  # Gumbel noise on the confidence, annealed to 0 over the steps (MaskGIT's 4.5)
    top_k: int = 0  # draw among so many of the most likely codes; 0: among all
    top_p: float = 1.0  # draw among the fewest codes that hold this share of the probability; 1: among all
    order: Order = 'confidence'  # which drawn tokens are kept first
    schedule: MaskSchedule = 'cosine'  # share still masked over the steps


@dataclass(frozen=True, kw_only=True)
class FreeEditConfig:
    """Mask-free editing (§3.3): again and again a random share of the tokens is drawn anew under the new text."""

    iterations: int = 100
    share: float = 0.08  # of the tokens, drawn in one iteration
    guidance_scale: float = 4.0
    temperature: float = 1.0
    top_k: int = 3
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class VQLossConfig:
    """Tokenizer losses (Table 5: perceptual 0.05, adversarial 0.1)."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.05
    perceptual_net: str = ''  # folder of converted VGG16-LPIPS weights; '' is a random-feature net (tiny recipe)
    adversarial: float = 0.1
    adversarial_adaptive: bool = False  # times the ratio of the other losses' gradient to its own at the last layer
    adversarial_start_step: int = 0
    discriminator_channels: int = 64
    r1: float = 1.0  # gradient penalty on real pictures
    r1_every_steps: int = 16
    lecam: float = 0.0  # pulls the critic's logits towards the averages of the other side: the alternative to R1
    commitment: float = 0.25
    codebook: float = 1.0
    entropy: float = 0.0  # sure assignments, evenly spread; what keeps the codes of 'lfq' in use
    revive_after_steps: int = 100  # 'vq': a code unused so long is moved onto a random encoder output; 0: never


@dataclass(frozen=True, kw_only=True)
class MaskedLossConfig:
    """Masked-token training (§2.3, §2.6, §2.7)."""

    label_smoothing: float = 0.1
    text_dropout: float = 0.1  # share of examples trained without text (§2.7)


@dataclass(frozen=True, kw_only=True)
class SuperresLossConfig(MaskedLossConfig):
    """Masked-token training of the super-res (§2.4)."""

    low_corruption: float = 0.2  # each example has a share of 0 to this of its low-res tokens replaced at random


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One source of training examples.

    kind 'scenes': pictures of a TFDS folder made by the emoji builder (or '' for the small sample in the package),
    composed on the fly; 'tfds': any TFDS dataset with an image and a caption; 'folder': pictures with captions.jsonl
    or captions.csv; 'webdataset' and 'parquet': as img2dataset writes them; 'precomputed': ArrayRecord shards written
    by tools/precompute.py.
    """

    kind: Literal['scenes', 'tfds', 'folder', 'webdataset', 'parquet', 'precomputed'] = 'scenes'
    path: str = ''  # folder; for 'tfds' the data_dir
    name: str = ''  # 'tfds' only: dataset name, e.g. 'coco_captions'
    split: str = 'train'
    # 'folder', 'webdataset', 'parquet', which have no splits: this share of the pictures, chosen by their names, is the
    # split 'heldout' and the others are 'train'.
    heldout_share: float = 0.0
    image_key: str = 'image'
    caption_key: str = 'caption'  # '' with 'folder', 'webdataset' and 'parquet': pictures alone
    image_size: int = 256
    min_side: int = 0  # pictures of fewer pixels on the shorter side are left out
    max_objects: int = 3  # 'scenes' only
    random_flip: bool = False  # photos only: captions that say left and right forbid it
    workers: int = 0  # grain worker processes; 0 reads in threads of this process
    max_unread: float = 0.01  # share of the rows trained on that may be unreadable; each counts for nothing
    text_length: int = 127


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser (Table 4: Adafactor 1e-4, betas 0.9/0.96, weight decay 0.045, warm-up 5000, cosine)."""

    name: Literal['adamw', 'adafactor'] = 'adamw'
    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.96
    weight_decay: float = 0.045
    warmup_steps: int = 5000
    final_fraction: float = 0.0  # learning rate at the last step, as a share of the peak
    gradient_clip: float = 1.0  # global norm; 0 is off


def _vq_optim() -> OptimConfig:
    """The tokenizer's and its critic's (Table 5: Adam 1e-4, betas 0.9/0.99, weight decay 1e-4, warm-up 10k)."""
    return OptimConfig(b2=0.99, weight_decay=1e-4, warmup_steps=10_000)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int
    batch_size: int  # global, over all devices and hosts
    seed: int = 0
    ema_decay: float = 0.9999  # warmed up: min(decay, (1 + step) / (10 + step))
    accumulate: int = 1  # micro-batches a step
    log_every_steps: int = 50
    save_every_steps: int = 1000
    save_every_minutes: float = 15.0
    keep_checkpoints: int = 3
    stall_minutes: float = 30.0  # a run in which nothing moves for so long ends; 0: never
    eval_every_steps: int = 1000
    eval_batches: int = 8
    eval_features: str = ''  # folder of tools/fetch_features.py: evaluations judge drawn pictures too; '': they don't
    eval_pictures: int = 64  # that are drawn for it, at most
    grid_every_steps: int = 2000
    profile_at: int = 0  # the first step of a profile, counted from 1; 0: only one asked for while the run goes on
    profile_steps: int = 3
    wandb: str = ''  # project of Weights & Biases to log to as well; '': nothing leaves the machine


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh. -1 on one axis takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """`train.py` with task 'tokenizer': the VQGAN."""

    task: Literal['tokenizer'] = 'tokenizer'
    model: VQConfig
    train: TrainConfig
    data: DataConfig
    eval_data: DataConfig
    init_from: str = ''  # folder of the tokenizer to start from: a release, or <workdir>/export; '': fresh weights
    loss: VQLossConfig = field(default_factory=VQLossConfig)
    optim: OptimConfig = field(default_factory=_vq_optim)
    discriminator_optim: OptimConfig = field(default_factory=_vq_optim)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True, kw_only=True)
class DecoderRun:
    """`train.py` with task 'decoder': a new decoder for a trained tokenizer, whose ids stay what they are (A.2)."""

    task: Literal['decoder'] = 'decoder'
    model: VQConfig  # the tokenizer's, but for the decoder's own width and depth
    train: TrainConfig
    data: DataConfig
    eval_data: DataConfig
    tokenizer: str  # folder of the tokenizer: a release, or <workdir>/export
    init_from: str = ''  # folder of a tokenizer whose decoder to start from; '': fresh weights
    loss: VQLossConfig = field(default_factory=VQLossConfig)
    optim: OptimConfig = field(default_factory=_vq_optim)
    discriminator_optim: OptimConfig = field(default_factory=_vq_optim)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """`train.py` with task 'base': the masked transformer over a frozen tokenizer and a frozen text encoder."""

    task: Literal['base'] = 'base'
    model: TransformerConfig
    train: TrainConfig
    data: DataConfig
    eval_data: DataConfig
    tokenizer: str  # folder holding tokenizer.safetensors and its config: a release, or <workdir>/export
    text_encoder: str = ''  # folder holding the text encoder; '' is the shipped one
    init_from: str = ''  # folder whose base to start from: a release, or <workdir>/export; '': fresh weights
    prompts: tuple[str, ...] = ()  # what the sheets show; (): captions of held-out pictures
    loss: MaskedLossConfig = field(default_factory=MaskedLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True, kw_only=True)
class SuperresRun:
    """`train.py` with task 'superres': high-res tokens from low-res tokens and text, over frozen nets."""

    task: Literal['superres'] = 'superres'
    model: SuperresConfig
    train: TrainConfig
    data: DataConfig
    eval_data: DataConfig
    tokenizer: str  # folder of the base's tokenizer, which makes the low-res tokens
    superres_tokenizer: str  # folder of the tokenizer of the high-res tokens: a release, or <workdir>/export
    text_encoder: str = ''  # folder holding the text encoder; '' is the shipped one
    init_from: str = ''  # folder whose super-res to start from: a release, or <workdir>/export; '': fresh weights
    prompts: tuple[str, ...] = ()  # what the sheets show, over low-res tokens of `base`; (): held-out pictures
    base: str = ''  # folder of the base that draws the low-res tokens of `prompts`
    loss: SuperresLossConfig = field(default_factory=SuperresLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(steps=8))
    mesh: MeshConfig = field(default_factory=MeshConfig)


Run = TokenizerRun | DecoderRun | BaseRun | SuperresRun


def read_run(values: Mapping[str, Any]) -> Run:
    """Reads a whole training config; `values['task']` picks the class."""
    runs = {'tokenizer': TokenizerRun, 'decoder': DecoderRun, 'base': BaseRun, 'superres': SuperresRun}
    task = values.get('task', '')
    if task not in runs:
        raise UserError(f"config key 'task' is {task!r}{nearest(str(task), runs)}")
    return read(runs[task], values)


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON-ready nested dict of a config; `read` of it gives the same config back."""
    return dataclasses.asdict(config)
