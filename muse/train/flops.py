"""Floating-point operations of the models, counted as 2·m·n·k for each matrix product, and what chips can do.

XLA's own count is not used: it takes the body of a scan once, whatever the number of layers. Norms, softmax, GELU and
look-ups are left out, as is usual where a share of the peak is stated.
"""

from __future__ import annotations

from muse.config import (
    DecoderRun,
    Run,
    SuperresConfig,
    SuperresRun,
    T5Config,
    TokenizerRun,
    TransformerConfig,
    VQConfig,
    VQLossConfig,
)

# Dense bfloat16 operations a second, from the makers' data sheets; the first name found in the device's is taken.
PEAKS = {
    'H100 PCIe': 756e12,
    'H100': 989e12,
    'H200': 989e12,
    'A100': 312e12,
    'RTX 4090': 165e12,
    'L40S': 362e12,
    'L4': 121e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,  # how a v5p names itself
    'TPU v6 lite': 918e12,
    'TPU7x': 2307e12 / 2,  # a device is half a chip
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device, as `jax.Device.device_kind` names it; None where not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def t5_flops(config: T5Config, batch: int, length: int) -> float:
    """Operations of one pass of the encoder over `batch` texts of `length` positions, padding included."""
    tokens, inner = batch * length, config.heads * config.head_dim
    projections = 4 * 2 * tokens * config.width * inner
    attention = 2 * 2 * tokens * length * inner  # q·k and weights·v
    mlp = (3 if config.gated else 2) * 2 * tokens * config.width * config.mlp_dim
    return float(config.layers * (projections + attention + mlp))


def _res_blocks(pixels: int, inputs: int, outputs: int, depth: int) -> int:
    """Residual blocks of two 3x3 convolutions, the first of which changes the width (with a 1x1 shortcut)."""
    first = 9 * (inputs * outputs + outputs * outputs) + (inputs * outputs if inputs != outputs else 0)
    return 2 * pixels * (first + (depth - 1) * 18 * outputs * outputs)


def encoder_flops(config: VQConfig, pixels: int) -> float:
    """Operations of the VQGAN's encoder and code search over pictures of `pixels` pixels in all."""
    width = config.channels * config.channel_mult[0]
    total = 2 * pixels * 27 * width
    for level, mult in enumerate(config.channel_mult):
        total += _res_blocks(pixels, width, config.channels * mult, config.num_res_blocks)
        width = config.channels * mult
        if level < len(config.channel_mult) - 1:
            pixels //= 4
            total += 2 * pixels * 9 * width * width
    total += _res_blocks(pixels, width, width, config.num_res_blocks) + 2 * pixels * width * config.code_dim
    search = 2 * pixels * config.codebook_size * config.code_dim if config.quantizer == 'vq' else 0
    return float(total + search)


def decoder_flops(config: VQConfig, pixels: int) -> float:
    """Operations of the VQGAN's decoder. A doubling counts as a 3x3 convolution at full size, as it is defined."""
    channels = config.decoder_channels or config.channels
    depth = config.decoder_num_res_blocks or config.num_res_blocks
    pixels, width = pixels // config.factor**2, channels * config.channel_mult[-1]
    total = 2 * pixels * 9 * config.code_dim * width + _res_blocks(pixels, width, width, depth)
    for level, mult in enumerate(reversed(config.channel_mult)):
        if level > 0:
            pixels *= 4
            total += 2 * pixels * 9 * width * width
        total += _res_blocks(pixels, width, channels * mult, depth)
        width = channels * mult
    return float(total + 2 * pixels * 27 * width)


def vgg_flops(pixels: int) -> float:
    """Operations of the convolutions of VGG16 (the perceptual loss)."""
    total, inputs = 0, 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        total += 2 * pixels * 9 * (inputs * width + (depth - 1) * width * width)
        inputs, pixels = width, pixels // 4
    return float(total)


def critic_flops(channels: int, pixels: int) -> float:
    """Operations of the PatchGAN critic: 4x4 convolutions, the first three of stride 2."""
    widths = (3, channels, 2 * channels, 4 * channels, 8 * channels, 1)
    shares = (4, 16, 64, 64, 64)
    layers = zip(widths[:-1], widths[1:], shares, strict=True)
    return float(sum(2 * pixels // share * 16 * inputs * outputs for inputs, outputs, share in layers))


def tokenizer_step_flops(model: VQConfig, loss: VQLossConfig, batch: int, side: int) -> float:
    """Operations of one training step of the tokenizer while its critic plays.

    A backward pass is twice a forward pass, or once where only the input's gradient is wanted. So the tokenizer counts
    3 times; VGG 3 times (picture, reconstruction, and back to the reconstruction); the critic 2 times for the
    tokenizer and 3 times for each of picture and reconstruction; R1, once in `r1_every_steps`, 6 times. Nothing is
    counted for what a program computes again.
    """
    pixels = batch * side * side
    return 3 * (encoder_flops(model, pixels) + decoder_flops(model, pixels)) + _judges_flops(loss, pixels)


def decoder_step_flops(model: VQConfig, loss: VQLossConfig, batch: int, side: int) -> float:
    """As `tokenizer_step_flops`, the encoder frozen: one pass."""
    pixels = batch * side * side
    return encoder_flops(model, pixels) + 3 * decoder_flops(model, pixels) + _judges_flops(loss, pixels)


def _judges_flops(loss: VQLossConfig, pixels: int) -> float:
    total = 3 * vgg_flops(pixels) if loss.perceptual else 0.0
    if loss.adversarial:
        passes = 8 + (6 / loss.r1_every_steps if loss.r1 else 0)
        total += passes * critic_flops(loss.discriminator_channels, pixels)
    return total


def _block_flops(width: int, mlp_dim: int, tokens: int, keys: int) -> int:
    """Self-attention over `keys` keys a query, and MLP, of one layer over `tokens` tokens."""
    return 2 * tokens * width * (4 * width + 2 * keys + 2 * mlp_dim)


def _cross_flops(width: int, tokens: int, rows: int, keys: int) -> int:
    """Cross-attention of one layer: queries and output, keys and values of `rows` memory rows, `keys` a query."""
    return 2 * tokens * width * (2 * width + 2 * keys) + 2 * rows * 2 * width * width


def transformer_flops(config: TransformerConfig, batch: int) -> float:
    """Operations of one pass of the base, each layer making its own keys and values, pads of the text included."""
    tokens, rows, width = batch * config.grid[0] * config.grid[1], batch * config.text_length, config.width
    layer = _block_flops(width, config.mlp_dim, tokens, config.grid[0] * config.grid[1])
    layer += _cross_flops(width, tokens, rows, 1 + config.text_length)
    return float(config.layers * layer + 2 * width * (tokens * config.codebook_size + rows * config.text_width))


def superres_flops(config: SuperresConfig, batch: int) -> float:
    """Operations of one pass of the super-res, as `transformer_flops`."""
    per_picture, low = config.grid[0] * config.grid[1], config.low_grid[0] * config.low_grid[1]
    tokens, rows, width = batch * per_picture, batch * (low + config.text_length), config.width
    layer = _block_flops(width, config.mlp_dim, tokens, 1) + 4 * tokens * width * (_seen(config) - 1)
    layer += _cross_flops(width, tokens, rows, 1 + low + config.text_length)
    total = config.layers * layer + config.low_layers * _block_flops(width, config.mlp_dim, batch * low, low)
    head_and_text = tokens * config.codebook_size + batch * config.text_length * config.text_width
    return float(total + 2 * width * head_and_text)


def base_draw_flops(config: TransformerConfig, batch: int, steps: int) -> float:
    """Operations of drawing pictures' tokens with guidance against no text (§2.7, §2.8).

    Both branches of each step count; the cross-attention of the one without text does not, which is a constant.
    Keys and values are made once a picture. Every token's logits count, known or not.
    """
    tokens, width = batch * config.grid[0] * config.grid[1], config.width
    block = _block_flops(width, config.mlp_dim, tokens, config.grid[0] * config.grid[1])
    cross = _cross_flops(width, tokens, 0, 1 + config.text_length)
    step = config.layers * (2 * block + cross) + 2 * 2 * tokens * width * config.codebook_size
    return float(steps * step + _memory_flops(config, batch * config.text_length, batch * config.text_length))


def superres_draw_flops(config: SuperresConfig, batch: int, steps: int) -> float:
    """As `base_draw_flops`, over given low-res tokens, which both branches read: they are made once a picture."""
    per_picture, low = config.grid[0] * config.grid[1], config.low_grid[0] * config.low_grid[1]
    tokens, rows, width = batch * per_picture, batch * (low + config.text_length), config.width
    block = _block_flops(width, config.mlp_dim, tokens, 1) + 4 * tokens * width * (_seen(config) - 1)
    cross = 2 * _cross_flops(width, tokens, 0, 1 + low) + 4 * tokens * width * config.text_length
    step = config.layers * (2 * block + cross) + 2 * 2 * tokens * width * config.codebook_size
    once = config.low_layers * _block_flops(width, config.mlp_dim, batch * low, low)
    return float(steps * step + once + _memory_flops(config, rows, batch * config.text_length))


def _seen(config: SuperresConfig) -> float:
    """Keys of a query: half of the heads attend within blocks, half across them."""
    return (config.block**2 + config.grid[0] * config.grid[1] // config.block**2) / 2


def _memory_flops(config: TransformerConfig | SuperresConfig, rows: int, texts: int) -> int:
    """Keys and values of every layer for so many rows of memory, and the projection of so many text states."""
    return config.layers * _cross_flops(config.width, 0, rows, 0) + 2 * config.width * texts * config.text_width


def step_flops(run: Run) -> float:
    """Operations of one training step of the whole batch; nothing is counted for what is computed again (remat)."""
    if isinstance(run, TokenizerRun):
        return tokenizer_step_flops(run.model, run.loss, run.train.batch_size, run.data.image_size)
    if isinstance(run, DecoderRun):
        return decoder_step_flops(run.model, run.loss, run.train.batch_size, run.data.image_size)
    count = superres_flops if isinstance(run, SuperresRun) else transformer_flops
    return 3 * count(run.model, run.train.batch_size)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
