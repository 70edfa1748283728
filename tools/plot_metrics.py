"""Draws curves of a run, and prints a table of a few of its steps.

    python tools/plot_metrics.py runs/tiny/base/metrics.jsonl --keys=loss,eval_loss,eval_loss_no_text --out=loss.png
    python tools/plot_metrics.py runs/a/metrics.jsonl runs/b/metrics.jsonl --keys=accuracy --table=100,500,1000

Several files are drawn into one picture, for runs to be compared. The table is Markdown, one row for each of the steps
named (or the nearest line of the log at or after it). A key that a line does not hold is left out there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

from muse.errors import UserError, main_guard, nearest

_SIZE, _MARGIN = (900, 520), (70, 50)
_COLOURS = ((30, 90, 200), (210, 70, 40), (40, 150, 70), (150, 70, 170), (200, 150, 20), (60, 160, 170))
Curve = tuple[str, list[tuple[float, float]]]  # name, (step, value) pairs


def read(path: str) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl.

    Raises:
        UserError: no such file, or not one of a run.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding='utf-8').splitlines()]
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): give the metrics.jsonl of a workdir") from None
    except ValueError:
        raise UserError(f"'{path}' holds lines that are not JSON: give the metrics.jsonl of a workdir") from None
    if not lines or not all(isinstance(line, dict) and 'step' in line for line in lines):
        raise UserError(f"'{path}' has no lines with a step: give the metrics.jsonl of a workdir")
    return lines


def curves(runs: dict[str, list[dict[str, float]]], keys: Sequence[str]) -> list[Curve]:
    """One curve for each run and key. Raises UserError when a key is in none of them."""
    known = {name for lines in runs.values() for line in lines for name in line if name != 'step'}
    for key in keys:
        if key not in known:
            raise UserError(f"no line holds '{key}'{nearest(key, known)}")
    found = []
    for run, lines in runs.items():
        for key in keys:
            points = [(line['step'], line[key]) for line in lines if key in line]
            if points:
                found.append((f'{run} {key}' if len(runs) > 1 else key, points))
    return found


def table(runs: dict[str, list[dict[str, float]]], keys: Sequence[str], steps: Sequence[int]) -> str:
    """A Markdown table: the first line of the log at or after each step."""
    text = ['| run | step | ' + ' | '.join(keys) + ' |', '|---' * (len(keys) + 2) + '|']
    for run, lines in runs.items():
        for step in steps:
            line = next((line for line in lines if line['step'] >= step), lines[-1])
            values = [f'{line[key]:.4g}' if key in line else '' for key in keys]
            text.append(f'| {run} | {line["step"]} | ' + ' | '.join(values) + ' |')
    return '\n'.join(text)


def chart(found: Sequence[Curve]) -> Image.Image:
    """The curves over the step, on one scale, with their names in the corner."""
    points = [point for _, curve in found for point in curve]
    (left, right), (low, high) = ((min(p[i] for p in points), max(p[i] for p in points)) for i in (0, 1))
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high, right = low - pad, high + pad, right if right > left else left + 1
    (width, height), (side, foot) = _SIZE, _MARGIN

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - left) / (right - left) * (width - side - 20)
        return side + across, height - foot - (value - low) / (high - low) * (height - foot - 20)

    image = Image.new('RGB', _SIZE, 'white')
    ink, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for value in _ticks(low, high):
        y = place(left, value)[1]
        ink.line((side, y, width - 20, y), fill=(230, 230, 230))
        ink.text((side - 8, y), f'{value:g}', fill='black', font=font, anchor='rm')
    for step in _ticks(left, right):
        x = place(step, low)[0]
        ink.line((x, height - foot, x, height - foot + 5), fill=(160, 160, 160))
        ink.text((x, height - foot + 8), f'{step:g}', fill='black', font=font, anchor='mt')
    ink.rectangle((side, 20, width - 20, height - foot), outline=(160, 160, 160))
    for i, (name, curve) in enumerate(found):
        colour = _COLOURS[i % len(_COLOURS)]
        at = [place(*point) for point in curve]
        ink.line(at, fill=colour, width=2)
        for x, y in at if len(at) < 40 else ():
            ink.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        ink.text((width - 30, 28 + 20 * i), name, fill=colour, font=font, anchor='rt')
    ink.text((width / 2, height - 8), 'step', fill='black', font=font, anchor='mb')
    return image


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers between two."""
    rough = (high - low) / 6
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', help='metrics.jsonl of one or several runs')
    parser.add_argument('--keys', default='loss', help='what to draw, with commas')
    parser.add_argument('--out', help='PNG to write')
    parser.add_argument('--table', default='', help='steps to print as a table, with commas')
    args = parser.parse_args(argv)
    with main_guard():
        runs = {Path(file).absolute().parent.name if len(args.files) < 2 else file: read(file) for file in args.files}
        keys = [key for key in args.keys.split(',') if key]
        found = curves(runs, keys)
        try:
            steps = [int(step) for step in args.table.split(',') if step]
        except ValueError:
            raise UserError(f'--table={args.table}: give steps with commas, as 100,500') from None
        if args.out:
            try:
                chart(found).save(args.out, optimize=True)
            except (OSError, ValueError) as error:
                raise UserError(f"'{args.out}' cannot be written ({error}): choose another --out") from None
        if steps:
            print(table(runs, keys, steps))
        if not args.out and not steps:
            raise UserError('nothing to do: give --out=FILE.png, --table=STEPS or both')


if __name__ == '__main__':
    main()
