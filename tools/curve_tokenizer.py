"""Stored size against likeness: tokenizers of several sizes after short runs, beside WebP files of the same bytes.

    python tools/curve_tokenizer.py --data=data/emoji --perceptual=data/perceptual --out=runs/curve

f16 is judged at 256 pixels and f8 at 512, whole pictures; both train on squares of 256. A tokenizer stores its tokens
at log2(codes) bits each, with no entropy coder; WebP gets as many bytes a picture, header included, at whichever of
several smaller sizes (brought back bicubically) and qualities comes nearest to the picture in the mean square. Rows
are printed as they come; the table in the end holds, after --minutes, what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from muse.config import TokenizerRun
from muse.errors import UserError, main_guard, warn
from tools.tokenizer_trials import Setting, Trial, changed, judges, numbers, pool_path, read_config, run_trials, table

CODES = (256, 2048, 16384)
_WEBP_SECONDS = 90  # of the time limit, kept from training for the search of WebP files
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)  # of the side, tried for WebP
COLUMNS = {'name': '', 'stored_bytes': '.0f', 'psnr': '.2f', 'ssim': '.3f', 'lpips_vgg': '.4f', 'lpips_alex': '.4f'}
COLUMNS |= {'codebook_usage': '.1%', 'perplexity': '.0f', 'parameters': 'd'}


def webp(img_HWC: np.ndarray, most: float) -> tuple[np.ndarray, int] | None:
    """The best WebP file of at most `most` bytes: what it decodes to, and its bytes; None where there is none."""
    picture, best = Image.fromarray(img_HWC), None
    for share in SHARES:
        side = max(8, round(picture.width * share))
        small = picture.resize((side, side), Image.Resampling.LANCZOS) if share < 1 else picture
        if (data := _largest(small, most)) is None:
            continue
        back = np.asarray(Image.open(io.BytesIO(data)).convert('RGB').resize(picture.size, Image.Resampling.BICUBIC))
        error = float(np.mean((back.astype(np.float32) - img_HWC) ** 2))
        if best is None or error < best[0]:
            best = (error, back, len(data))
    return best[1:] if best else None


def _largest(picture: Image.Image, most: float) -> bytes | None:
    """The WebP file of the highest quality that `most` bytes hold."""
    found, low, high = None, 0, 100
    while low <= high:
        quality, stream = (low + high) // 2, io.BytesIO()
        picture.save(stream, 'WEBP', quality=quality, method=4)
        if stream.tell() <= most:
            found, low = stream.getvalue(), quality + 1
        else:
            high = quality - 1
    return found


def webp_row(pictures_NHWC: np.ndarray, most: float, perceptual: str) -> dict[str, Any] | None:
    """WebP at `most` bytes a picture, judged as the tokenizers are; None where some picture does not fit."""
    import jax.numpy as jnp

    from muse.evals.reconstruction import psnr, ssim
    from muse.models import perceptual as lpips
    from muse.models.vqgan import to_float

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda img: webp(img, most), pictures_NHWC))
    if None in files:
        warn(f'WebP cannot store every picture in {most:.0f} bytes: left out')
        return None
    made_NHWC, sizes = (np.stack([file[i] for file in files if file]) for i in (0, 1))
    compare: dict[str, Any] = {'psnr': psnr, 'ssim': ssim}
    for name, net in judges(perceptual, '')[0].items():
        compare[name] = lambda a, b, net=net: lpips.lpips(net, a, b)
    found: dict[str, list[float]] = {name: [] for name in compare}
    for start in range(0, len(made_NHWC), 16):
        rows = slice(start, start + 16)
        a_BHWC, b_BHWC = to_float(jnp.asarray(pictures_NHWC[rows])), to_float(jnp.asarray(made_NHWC[rows]))
        for name, score in compare.items():
            found[name] += np.asarray(score(a_BHWC, b_BHWC)).tolist()
    side = pictures_NHWC.shape[1]
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {'name': f'webp {side}', 'stored_bytes': float(np.mean(sizes)), 'allowed_bytes': most, **means}


def trials(args: argparse.Namespace) -> list[Trial]:
    """f16 and f8 with each number of codes."""
    found = []
    for name, config, side in (('f16', args.f16, args.side), ('f8', args.f8, 2 * args.side)):
        run = read_config(config, data=args.data, perceptual=args.perceptual, image_size=side)
        run = _short(run, args)
        for codes in args.codes:
            trial = changed(run, model={'codebook_size': codes})
            found.append(Trial(name=f'{name} {side} {codes} codes', run=trial, crop=args.side))
    return found


def _short(run: TokenizerRun, args: argparse.Namespace) -> TokenizerRun:
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, workers=args.workers),
        optim=dataclasses.replace(run.optim, warmup_steps=args.steps // 10),
        discriminator_optim=dataclasses.replace(run.discriminator_optim, warmup_steps=args.steps // 10),
    )
    loss = {'adversarial_start_step': args.steps * 2 // 5}
    train = {'steps': args.steps, 'batch_size': args.batch_size, 'ema_decay': 0.995}
    return changed(run, model={'channels': args.channels} if args.channels else {}, loss=loss, train=train)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--f16', default='configs/emoji/tokenizer.py', help='config of the f16 tokenizer')
    parser.add_argument('--f8', default='configs/emoji/superres_tokenizer.py', help='config of the f8 tokenizer')
    parser.add_argument('--data', default='', help='folder of the data; the sample in the package when empty')
    parser.add_argument('--perceptual', default='', help='folder of LPIPS weights; empty: a random net, no LPIPS')
    parser.add_argument('--out', required=True, help='folder of the rows and of the pictures drawn for the runs')
    parser.add_argument('--codes', type=numbers, default=CODES, help='sizes of the codebook, with commas')
    parser.add_argument('--steps', type=int, default=1000, help='steps of each run')
    parser.add_argument('--batch_size', type=int, default=32, help='squares a step')
    parser.add_argument('--side', type=int, default=256, help="f16's side; f8 is judged at twice that")
    parser.add_argument('--channels', type=int, default=0, help='base channels; 0: as the configs have it')
    parser.add_argument('--pool', type=int, default=4000, help='pictures to train on')
    parser.add_argument('--heldout', type=int, default=192, help='pictures to judge on')
    parser.add_argument('--jobs', type=int, default=4, help='runs at a time, sharing the device')
    parser.add_argument('--minutes', type=float, default=240.0, help='time limit of everything')
    parser.add_argument('--workers', type=int, default=0, help='processes that draw pictures')
    return parser.parse_args()


def _check(args: argparse.Namespace) -> None:
    for name in ('steps', 'batch_size', 'side', 'pool', 'heldout', 'jobs', 'minutes'):
        if getattr(args, name) <= 0:
            raise UserError(f'--{name}={getattr(args, name)}: give more than 0')


def main() -> None:
    """Trains the tokenizers, packs the WebP files, prints both as one table."""
    args = _flags()
    with main_guard():
        _check(args)
        deadline = time.monotonic() + 60 * args.minutes
        setting = Setting(pool=str(Path(args.out) / 'pool'), perceptual=args.perceptual, features='', eval_batch=8)
        out = Path(args.out) / 'curve.jsonl'
        sizes: dict[str, Any] = {'jobs': args.jobs, 'pool': args.pool, 'heldout': args.heldout, 'out': out}
        known = {trial.name: trial for trial in trials(args)}
        rows = run_trials(list(known.values()), setting, deadline=deadline - _WEBP_SECONDS, **sizes)
        if not rows:
            raise UserError(f'no tokenizer was trained within --minutes={args.minutes:g}: give more, or fewer --steps')
        for row in list(rows):
            if time.monotonic() > deadline:
                warn(f'no time is left for WebP beside {row["name"]}: give more --minutes')
                continue
            held_out = np.load(pool_path(setting.pool, known[row['name']].run.eval_data))
            if (beside := webp_row(held_out, row['stored_bytes'], args.perceptual)) is None:
                continue
            rows.append(beside)
            with out.open('a', encoding='utf-8') as stream:
                print(json.dumps(beside), file=stream)
            print(json.dumps(beside), flush=True)
        print(table(sorted(rows, key=lambda row: (row['name'].split()[-1], row['stored_bytes'])), COLUMNS))


if __name__ == '__main__':
    main()
