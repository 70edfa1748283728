"""What each part of the tokenizer's training is worth: equal short runs, each without one part, judged on held-out art.

    python tools/ablate_tokenizer.py --data=data/emoji --perceptual=data/perceptual --features=data/features \\
        --out=runs/ablation --steps=1500

Prints one JSON line a run as it ends, and a table in the end, which after --minutes holds what there is;
OUT/ablation.jsonl keeps the rows. The first variant runs under a second seed before all others, and the best one
(LPIPS on AlexNet, which nothing was trained on) too if time is left: what two seeds differ by is the size of chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from muse.config import TokenizerRun
from muse.errors import UserError, main_guard, nearest
from tools.tokenizer_trials import Setting, Trial, changed, read_config, run_trials, table

# FSQ has no 2^11 of even steps in fewer coordinates; these are powers of two, as ids are.
LEVELS = {64: (4, 4, 4), 256: (8, 8, 4), 1024: (8, 8, 4, 4), 2048: (8, 8, 8, 4), 4096: (8, 8, 8, 8)}
LEVELS |= {8192: (8, 8, 8, 4, 4), 16384: (8, 8, 8, 8, 4)}
COLUMNS = {'name': '', 'seed': 'd', 'psnr': '.2f', 'ssim': '.3f', 'lpips_vgg': '.4f', 'lpips_alex': '.4f'}
COLUMNS |= {'frechet_lite0': '.1f', 'codebook_usage': '.1%', 'perplexity': '.0f', 'images_per_s': '.0f'}


def variants(run: TokenizerRun) -> dict[str, TokenizerRun]:
    """The whole recipe and what it becomes without, or with another, part."""
    codes = run.model.codebook_size
    if codes not in LEVELS:
        raise UserError(f'--codes={codes}: FSQ levels are known for {", ".join(map(str, LEVELS))}')
    fsq = {'quantizer': 'fsq', 'levels': LEVELS[codes], 'code_dim': len(LEVELS[codes]), 'l2_normalize': False}
    lfq = {'quantizer': 'lfq', 'code_dim': int(math.log2(codes)), 'l2_normalize': False}
    return {
        'full': run,
        'no_perceptual': changed(run, loss={'perceptual': 0.0}),
        'no_adversarial': changed(run, loss={'adversarial': 0.0}),
        'no_revival': changed(run, loss={'revive_after_steps': 0}),
        'no_l2': changed(run, model={'l2_normalize': False}),
        'fsq': changed(run, model=fsq),
        'lfq': changed(run, model=lfq, loss={'entropy': 0.1}),
        'lecam': changed(run, loss={'r1': 0.0, 'lecam': 0.01}),
        'adaptive': changed(run, loss={'adversarial': 0.5, 'adversarial_adaptive': True}),
    }


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/emoji/tokenizer.py', help='the whole recipe')
    parser.add_argument('--data', default='', help='folder of the data; the sample in the package when empty')
    parser.add_argument('--perceptual', default='', help='folder of LPIPS weights; empty: a random net, no LPIPS')
    parser.add_argument('--features', default='', help='folder of the feature net; empty: no Fréchet distance')
    parser.add_argument('--out', required=True, help='folder of the rows and of the pictures drawn for the runs')
    names = 'full,no_perceptual,no_adversarial,no_revival,no_l2,fsq,lfq,lecam,adaptive'
    parser.add_argument('--variants', default=names, help='what to run, with commas')
    parser.add_argument('--steps', type=int, default=1500, help='steps of each run')
    parser.add_argument('--batch_size', type=int, default=32, help='pictures a step')
    parser.add_argument('--image_size', type=int, default=128, help='side of the pictures')
    parser.add_argument('--codes', type=int, default=2048, help='size of every codebook')
    parser.add_argument('--channels', type=int, default=0, help='base channels; 0: as the config has it')
    parser.add_argument('--pool', type=int, default=20000, help='pictures to train on')
    parser.add_argument('--heldout', type=int, default=512, help='pictures to judge on')
    parser.add_argument('--jobs', type=int, default=4, help='runs at a time, sharing the device')
    parser.add_argument('--minutes', type=float, default=240.0, help='time limit of all runs together')
    parser.add_argument('--workers', type=int, default=0, help='processes that draw pictures')
    return parser.parse_args()


def base_run(args: argparse.Namespace) -> TokenizerRun:
    """The recipe of --config at the ablation's size; the critic starts after two fifths, as there."""
    run = read_config(args.config, data=args.data, perceptual=args.perceptual, image_size=args.image_size)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=args.workers))
    optim, disc = (dataclasses.replace(o, warmup_steps=args.steps // 10) for o in (run.optim, run.discriminator_optim))
    run = dataclasses.replace(run, optim=optim, discriminator_optim=disc)
    return changed(
        run,
        model={'codebook_size': args.codes} | ({'channels': args.channels} if args.channels else {}),
        loss={'adversarial_start_step': args.steps * 2 // 5},
        train={'steps': args.steps, 'batch_size': args.batch_size, 'ema_decay': 0.995},
    )


def main() -> None:
    """Runs the variants, then the best one again, and prints the table."""
    args = _flags()
    with main_guard():
        known = variants(base_run(args))
        chosen = list(dict.fromkeys(args.variants.split(',')))
        for name in chosen:
            if name not in known:
                raise UserError(f"--variants names '{name}'{nearest(name, known)}")
        counts = {'steps': args.steps, 'batch_size': args.batch_size, 'pool': args.pool, 'heldout': args.heldout}
        for name, value in (counts | {'jobs': args.jobs}).items():
            if value < 1:
                raise UserError(f'--{name}={value}: give 1 or more')
        if args.minutes <= 0:
            raise UserError(f'--minutes={args.minutes}: give more than 0')
        print(table(_run_all(args, known, chosen), COLUMNS))


def _run_all(args: argparse.Namespace, known: dict[str, TokenizerRun], chosen: list[str]) -> list[dict[str, Any]]:
    """The rows of the variants, and of two of them again under a second seed."""
    setting = Setting(pool=str(Path(args.out) / 'pool'), perceptual=args.perceptual, features=args.features)
    sizes: dict[str, Any] = {'jobs': args.jobs, 'pool': args.pool, 'heldout': args.heldout}
    sizes |= {'out': Path(args.out) / 'ablation.jsonl', 'deadline': time.monotonic() + 60 * args.minutes}

    def trial(name: str, seed: int) -> Trial:
        return Trial(name=name, run=changed(known[name], train={'seed': seed}), crop=args.image_size)

    trials = [trial(chosen[0], 0), trial(chosen[0], 1), *(trial(name, 0) for name in chosen[1:])]
    rows = run_trials(trials, setting, **sizes)
    if not rows:
        raise UserError(f'no run finished within --minutes={args.minutes:g}: give more, or fewer --steps')
    best = min(rows, key=lambda row: row.get('lpips_alex', -row['psnr']))['name']
    if best != chosen[0] and time.monotonic() < sizes['deadline']:
        rows += run_trials([trial(best, 1)], setting, **sizes)
    return rows


if __name__ == '__main__':
    main()
