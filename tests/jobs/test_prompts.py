"""The plan of a sampling job depends on its rows alone: names, noise, batches."""

from __future__ import annotations

import json
import operator

import pytest

from muse.errors import InputWarning, UserError
from muse.jobs.plan import all_items, file_id, share, slug
from muse.jobs.prompts import COLUMNS, Prompt, make_plan, read_prompt
from muse.settings import Settings


def settings_of(size):
    if size == (17, 17):
        raise UserError('size is 17×17')
    return Settings(seed=5, negative_prompt='none', size=size or (16, 16), superres=None, steps=3, guidance_scale=2.0)


def plan_of(rows, num_images=1, batch_size=2, unit=2):
    refused = []
    options = {'num_images': num_images, 'model': {'model': 'm'}, 'batch_size': batch_size, 'unit': unit}
    plan = make_plan(rows, settings_of, lambda row, error: refused.append((row.place, str(error))), **options)
    return plan, refused


def items_of(plan):
    return [item for _, item in all_items(plan)]


def test_what_is_drawn_and_what_is_written_beside_it():
    rows = [Prompt(0, 1, 'A cat!'), Prompt(1, 2, 'dog', seed=9, guidance_scale=0.5, temperature=0.1)]
    rows += [Prompt(2, 3, 'named', id='my-id', negative_prompt='')]
    plan, refused = plan_of(rows, num_images=2)
    items = items_of(plan)
    assert not refused and plan.pictures == 6
    assert [item.stem for item in items] == ['0000_a-cat', '0001_a-cat', '0002_dog', '0003_dog', 'my-id_0', 'my-id_1']
    # A row with a seed of its own counts its pictures from 0, so that they do not depend on its place.
    assert [item.task.index for item in items] == [0, 1, 0, 1, 4, 5]
    assert [item.task.seed for item in items] == [None, None, 9, 9, None, None]
    dog, named = items[3].about, items[4].about
    expected = {'prompt': 'dog', 'index': 1, 'seed': 9, 'guidance_scale': 0.5, 'temperature': 0.1, 'steps': 3}
    assert {name: dog[name] for name in expected} == expected and dog['negative_prompt'] == 'none'
    assert named['id'] == 'my-id_0' and named['negative_prompt'] == '' and named['seed'] == 5 and named['model'] == 'm'
    assert json.loads(items[0].about_json)['size'] == [16, 16]


def test_a_manifest_is_a_file_of_prompts_that_draws_the_same():
    rows = [Prompt(3, 1, 'cat'), Prompt(5, 2, 'dog', seed=9), Prompt(6, 3, 'cow', guidance_scale=1.0, size=(16, 24))]
    rows += [Prompt(7, 4, 'owl', id='owl')]
    first = items_of(plan_of(rows, num_images=2)[0])
    lines = [json.loads(item.about_json) for item in first]
    again = [
        read_prompt(place, 1, {name: line[name] for name in COLUMNS if line.get(name) is not None})
        for place, line in enumerate(lines)
    ]
    second = items_of(plan_of(again)[0])
    assert [item.stem for item in second if 'id' in item.about] == ['owl_0', 'owl_1']
    key = operator.itemgetter('prompt', 'index')  # the order of drawing is size by size
    first, second = (sorted(items, key=lambda item: key(item.about)) for items in (first, second))
    for a, b in zip(first, second, strict=True):
        for name in ('seed', 'negative_prompt', 'guidance_scale', 'temperature'):
            assert a.about[name] == b.about[name] and getattr(b.task, name) == a.about[name]
        assert (a.task.prompt, a.task.index, a.about['size']) == (b.task.prompt, b.task.index, b.about['size'])
    # An index of its own also counts on over the pictures of a row, with or without a seed.
    more = items_of(plan_of([Prompt(4, 1, 'x', index=7), Prompt(5, 2, 'y', index=2, seed=3)], num_images=2)[0])
    assert [item.task.index for item in more] == [7, 8, 2, 3]


def test_rows_are_grouped_by_size_and_batches_by_place():
    rows = [Prompt(i, i, f'p{i}', size=(16, 24) if i % 3 == 1 else None) for i in range(8)]
    plan, _ = plan_of(rows, batch_size=2)
    units = [[item.task.prompt for item in plan.items(unit)] for unit in range(len(plan))]
    assert units == [['p0', 'p2'], ['p3', 'p5'], ['p6'], ['p1', 'p4'], ['p7']]
    assert [plan.settings(unit).size for unit in range(5)] == [(16, 16)] * 3 + [(16, 24)] * 2
    assert [plan.batch_size(unit) for unit in range(5)] == [2] * 5  # the short ones are filled up


def test_units_are_whole_batches():
    plan, _ = plan_of([Prompt(i, i, 'x') for i in range(7)], num_images=2, batch_size=4, unit=5)
    assert [len(plan.items(unit)) for unit in range(len(plan))] == [8, 6]
    plan, _ = plan_of([Prompt(0, 1, 'x')], batch_size=8, unit=8)
    assert len(plan) == 1 and plan.batch_size(0) == 1  # a small job is not blown up to a batch


@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_processes_share_all_units(count):
    shares = [share(7, process, count) for process in range(count)]
    assert sorted(unit for each in shares for unit in each) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_that_cannot_be_drawn_are_refused_and_the_others_keep_names_and_noise():
    rows = [Prompt(0, 1, 'a', id='x'), Prompt(1, 2, 'b', id='X'), Prompt(2, 3, 'c', size=(17, 17))]
    rows += [Prompt(3, 4, 'd', id='grid'), Prompt(4, 5, 'e'), Prompt(5, 6, 'f', id='0004_e')]
    plan, refused = plan_of(rows)
    assert [place for place, _ in refused] == [1, 2, 3, 5]
    assert 'as those of row 1' in refused[0][1] and 'kept for another file' in refused[2][1]
    assert [(item.stem, item.task.index) for item in items_of(plan)] == [('x', 0), ('0004_e', 4)]


def test_an_index_beyond_the_last_is_refused_with_its_row():
    plan, refused = plan_of([Prompt(0, 1, 'a', index=2**31 - 2), Prompt(1, 2, 'b', index=2**31 - 1)], num_images=2)
    assert [item.task.index for item in items_of(plan)] == [2**31 - 2, 2**31 - 1]
    assert len(refused) == 1 and refused[0][0] == 1 and 'index is 2147483648' in refused[0][1]


def test_an_id_leaves_room_for_the_number_of_its_pictures():
    """A manifest's lines are rows of prompts: each id in it must be one."""
    rows = [Prompt(place, place + 1, 'x', id='abcde'[place] * length) for place, length in enumerate((98, 99, 100))]
    plan, refused = plan_of(rows, num_images=10)
    ids = [item.about['id'] for item in items_of(plan)]
    assert max(map(len, ids)) == 100 and [file_id(each) for each in ids] == ids
    assert refused == [
        (1, 'its id has 99 characters, and its pictures are called …bbbbbb_9: give up to 98'),
        (2, 'its id has 100 characters, and its pictures are called …cccccc_9: give up to 98'),
    ]
    assert plan_of(rows)[1] == []
    assert 'give up to 97' in plan_of(rows, num_images=11)[1][0][1]


def test_blank_prompts_are_said():
    with pytest.warns(InputWarning, match='empty prompts: 2 of 3'):
        plan_of([Prompt(0, 1, ' '), Prompt(1, 2, 'x'), Prompt(2, 3, '\x00\x07')])


def test_slugs():
    assert slug('Two dogs, left & right!') == 'two-dogs-left-right'
    assert slug('🍎') == slug('') == 'picture'
    assert len(slug('word ' * 50)) <= 60
