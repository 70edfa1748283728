"""Rows of text, CSV and JSON Lines: what is read, which line a rejected one is said to be on, what stops."""

from __future__ import annotations

import dataclasses
import json

import pytest

from muse.errors import InputWarning, UserError
from muse.jobs.prompts import COLUMNS, Prompt, read_prompt
from muse.jobs.rows import SHOWN, Reject, read_table, size, warn_of_rejects, whole_numbers


def read(path):
    return read_table(str(path), COLUMNS, read_prompt, 'prompt')


def file(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


def prompts(table):
    return [(row.place, row.line, row.prompt) for row in table.rows]


def test_text_has_a_prompt_a_line(tmp_path):
    text = '\ufeffa cat\r\n\r\n  a dog \na\u2028break\n'  # a line separator of Unicode ends no line
    assert prompts(read(file(tmp_path, 'p.txt', text))) == [(0, 1, 'a cat'), (1, 3, 'a dog'), (2, 4, 'a\u2028break')]


def test_csv_and_jsonl_hold_the_same(tmp_path):
    table = file(
        tmp_path,
        'p.csv',
        'prompt,id,seed,negative_prompt,guidance_scale,temperature,size\n'
        '"a cat, sitting",cat,7,a dog,2.5,0.5,16x24\n'
        'plain,,,,,,\n',
    )
    rows = [
        {'prompt': 'a cat, sitting', 'id': 'cat', 'seed': 7, 'negative_prompt': 'a dog', 'guidance_scale': 2.5}
        | {'temperature': 0.5, 'size': [16, 24]},
        {'prompt': 'plain', 'seed': None},
    ]
    lines = file(tmp_path, 'p.jsonl', '\n'.join(map(json.dumps, rows)))
    expected = [
        Prompt(0, 2, 'a cat, sitting', 'cat', 7, None, 'a dog', 2.5, 0.5, (16, 24)),
        Prompt(1, 3, 'plain'),
    ]
    assert read(table).rows == expected
    assert [row.line for row in read(lines).rows] == [1, 2]
    assert [dataclasses.replace(row, line=row.line + 1) for row in read(lines).rows] == expected


def test_rejected_rows_name_their_line_and_keep_their_place(tmp_path):
    lines = [
        '{"prompt": "good"}',
        '{"prompt": "cut',
        '[1, 2]',
        '{"seed": 3}',
        '{"prompt": 5}',
        '{"prompt": "x", "seed": 1.5}',
        '{"prompt": "x", "seed": true}',
        '{"prompt": "x", "guidance_scale": "much"}',
        '{"prompt": "x", "temperature": NaN}',
        '{"prompt": "x", "size": "big"}',
        '{"prompt": "x", "size": [16, 0]}',
        '{"prompt": "x", "id": "../up"}',
        '{"prompt": "x", "negative_prompt": "nul \\u0000"}',
        '{"prompt": "lone \\ud800"}',
        '[' * 100_000,
        '',
        '{"prompt": "good too"}',
    ]
    table = read(file(tmp_path, 'p.jsonl', '\n'.join(lines)))
    assert prompts(table) == [(0, 1, 'good'), (15, 17, 'good too')]
    assert [reject.line for reject in table.rejects] == list(range(2, 16))
    said = ['no JSON', 'a JSON list', 'no prompt', 'prompt 5', 'seed is 1.5', 'seed is True', "'much'", 'temperature']
    said += ['size is', 'height is 0', 'id is', 'NUL', 'UTF-8', 'no JSON']
    for reject, part in zip(table.rejects, said, strict=True):
        assert part in reject.error and '\n' not in reject.error, reject
        assert reject.row == lines[reject.line - 1][:1000]
    assert table.reject(17, UserError('why')) == Reject(17, 'why', '{"prompt": "good too"}')


def test_broken_csv_names_the_first_line_of_the_row(tmp_path):
    text = 'prompt,seed\na cat,1\n"two\nlines",2\nlone,comma,3\n"stray"quote,4\nlast,5\n'
    table = read(file(tmp_path, 'p.csv', text))
    assert prompts(table) == [(0, 2, 'a cat'), (1, 3, 'two\nlines'), (4, 7, 'last')]
    assert [(reject.line, reject.row) for reject in table.rejects] == [(5, 'lone,comma,3'), (6, '"stray"quote,4')]
    assert table.reject(3, UserError('why')).row == '"two\nlines",2'
    open_quote = read(file(tmp_path, 'q.csv', 'prompt\na cat\n"no end\nx\n'))
    assert open_quote.rejects[0].line == 3 and 'line 4 is broken' in open_quote.rejects[0].error
    assert open_quote.rejects[0].row == '"no end\nx'


def test_long_fields_and_strange_names(tmp_path):
    """Texts as long as a prompt may be are read from CSV too; longer ones cost their row alone."""
    table = read(file(tmp_path, 'p.csv', 'prompt\n' + 'a ' * 100_000 + '\n' + 'b' * 2_000_000 + '\nlast\n'))
    assert [row[1] for row in prompts(table)] == [2, 4] and 'over the limit' in table.rejects[0].error
    with pytest.warns(InputWarning) as caught:
        read(file(tmp_path, 'p.jsonl', '{"prompt": "a", "two\\nlines": 1}\n'))
    assert '\n' not in str(caught[0].message)
    long = read(file(tmp_path, 'q.jsonl', '{"prompt": "a"}\n{"prompt": "a", "seed": ' + '9' * 4000 + '}\n'))
    assert 'seed is 999' in long.rejects[0].error and len(long.rejects[0].error) < 200


def test_bytes_that_are_no_utf8_reject_their_row_only(tmp_path):
    table = read(file(tmp_path, 'p.txt', b'a cat\ncaf\xe9\n'))
    assert prompts(table) == [(0, 1, 'a cat')]
    assert 'UTF-8' in table.rejects[0].error


def test_unknown_columns_are_named(tmp_path):
    with pytest.warns(InputWarning, match="column 'sede' is not used; did you mean 'seed'"):
        table = read(file(tmp_path, 'p.csv', 'prompt,sede\na,3\n'))
    assert table.rows[0].seed is None
    with pytest.warns(InputWarning, match="columns 'file', 'steps' are not used; known are prompt, id, .*, size$"):
        read(file(tmp_path, 'p.csv', 'prompt,steps,file\na,3,x\n'))


def test_a_file_of_bad_rows_only_has_no_row(tmp_path):
    table = read(file(tmp_path, 'p.csv', 'words\na cat\n'))
    assert not table.rows and [(reject.line, reject.error[:16]) for reject in table.rejects] == [
        (2, 'it has no prompt')
    ]


@pytest.mark.parametrize(
    ('name', 'text', 'said'),
    [
        ('none.txt', None, 'cannot be read'),
        ('p.txt', '\n \n', 'holds no prompt'),
        ('p.csv', '', 'holds no prompt'),
        ('p.csv', 'prompt\n', 'holds no prompt'),
        ('p.csv', 'prompt,prompt\na,b\n', 'twice'),
        ('p.json', '[]', "ends in '.json'"),
        ('p.parquet', 'PAR1', "ends in '.parquet'"),
    ],
)
def test_files_that_give_nothing_stop(tmp_path, name, text, said):
    path = tmp_path / name if text is None else file(tmp_path, name, text)
    with pytest.raises(UserError, match=said.replace('.', r'\.')) as caught:
        read(path)
    assert '\n' not in str(caught.value)


def test_only_the_first_rejects_are_named_one_by_one(tmp_path):
    rejects = [Reject(line, 'why', 'row') for line in range(1, SHOWN + 3)]
    with pytest.warns(InputWarning) as caught:
        warn_of_rejects('p.csv', rejects, tmp_path / 'rejects.jsonl')
    said = [str(warning.message) for warning in caught]
    assert len(said) == SHOWN + 1 and 'line 1 ' in said[0]
    assert f'{SHOWN + 2} rows left out (2 more; all in' in said[-1]


def test_numbers_in_texts():
    assert size('16x24') == size('16 X 24') == size('16×24') == size([16, 24]) == (16, 24)
    assert whole_numbers('box', '1, 2,3,4', 4, 'x0,y0,x1,y1') == (1, 2, 3, 4)
    for wrong in ('16', '16x', '1x2x3', [16], [16, 24.5], [16, True], 16, None):
        with pytest.raises(UserError, match='size is'):
            size(wrong)
