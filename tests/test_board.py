"The board of benchmarks: it is data, a table, and says what it has not"
import json, platform, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/'benchmarks'))
import board
from record import Record,make_row,quantity,ratio_text,target_text

MACHINE = dict(cpu='A processor', flags=['avx2'], cores=2, gpu=None, python='3.11.7', torch='2.5.0', fastai='2.8.8')
ROW = make_row('Training step, fixed masks', 'mlp', 95., 'ms', 'dense', 100., target='ratio <= 1.05', quartiles=[.9,1.])

def result(*rows, **machine): return dict(command='python benchmarks/x.py', about='CPU time', machine=dict(MACHINE, **machine), threads=1, peers={}, measured='2026-01-01', seconds=1, rows=list(rows))

def main(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['board.py', *map(str, args)])
    board.main()

@pytest.mark.slow
def test_a_benchmark_becomes_json_and_a_table(tmp_path):
    args = [sys.executable, '-W', 'ignore', str(ROOT/'benchmarks'/'board.py'), '--quick', '--only', 'scaling']
    done = subprocess.run([*args, '--results', str(tmp_path)], capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0]=='| what | case | ours | peer | ratio | target |' and {l.count('|') for l in lines[:4]}=={7}
    assert (tmp_path/'board.md').read_text()==done.stdout and lines[-1].startswith('Not measured: step_overhead, dst_step')
    found,made = (json.loads((tmp_path/f'{n}.json').read_text()) for n in ('scaling','board'))
    for r in found['rows']: assert r['ours']>0 and r['value']>0 and r['ratio']==r['ours']/r['value'] and r['peer']=='1 M parameters'
    assert [r['what'] for r in made['rows']]==['Mask update, global','Masking of a step'] and found['machine']['cores']>0
    assert found['command']=='python benchmarks/scaling.py --millions 1 2 --repeats 1'
    assert not any(word in (tmp_path/f'{n}.json').read_text() for n in ('scaling','board') for word in (str(tmp_path), str(ROOT), *[platform.node()]*(len(platform.node())>3)))

def test_quick_results_are_not_those_of_the_project(monkeypatch, capsys):
    with pytest.raises(SystemExit): main(monkeypatch, '--quick')
    assert '--quick measures nothing' in capsys.readouterr().err

@pytest.mark.slow
def test_what_fails_or_is_missing_has_a_row_and_the_others_go_on(monkeypatch, capfd, tmp_path):
    few = dict(scaling=board.Benchmark('--millions none'), dst_accuracy=board.BENCHMARKS['dst_accuracy'], deploy=board.Benchmark(needs=('nowhere',)))
    monkeypatch.setattr(board, 'BENCHMARKS', few)
    with pytest.raises(SystemExit) as e: main(monkeypatch, '--results', tmp_path, '--only', *few)
    text = capfd.readouterr().out
    assert e.value.code==1 and "| scaling |  | failed: scaling.py: error: argument --millions: invalid int value: 'none' |" in text
    assert '| dst_accuracy |  | needs mnist.npz in the folder given by --data |' in text and '| deploy |  | nowhere not installed |' in text
    (tmp_path/'dst_accuracy.json').write_text(json.dumps(result(ROW)))
    (tmp_path/'scaling.json').unlink()
    main(monkeypatch, '--results', tmp_path, '--only', 'dst_accuracy')
    assert json.loads((tmp_path/'dst_accuracy.json').read_text())==result(ROW)

def test_a_peer_that_is_not_installed_is_told():
    row = make_row('Training step, fixed masks', 'mlp', 95., 'ms', 'fasterai, agp', None, target='ratio <= 1')
    assert board.row_cells(row)[3:]==['fasterai, agp: not installed', '–', '≤ 1×']

def test_machines_are_not_mixed():
    found = dict(step_overhead=result(ROW), dst_step=result(dict(ROW, what='Training step, RigL')))
    one = board.markdown(board.board(found))
    assert '\nA processor, 2 cores, avx2, python 3.11.7, torch 2.5.0, fastai 2.8.8' in one and '| machine |' not in one
    found['dst_step']['machine']['cpu'] = 'Another'
    two = board.markdown(board.board(found)).splitlines()
    assert two[0].endswith('| machine |') and two[2].endswith('| A |') and two[3].endswith('| B |')
    assert two[5].startswith('A: A processor') and two[6].startswith('B: Another') and '(dst_step)' in two[6]

@pytest.mark.parametrize('kind,target,ratio,met,text', [('cost','ratio <= 1.02',.5,True,'0.500×'), ('speed','ratio >= 6',2.,False,'2.00× as fast'), ('points','ratio >= -5',-10.,False,'-10.00 points'),
                                                       ('cost','ours <= 10',.5,True,'0.500×'), ('cost',None,.5,None,'0.500×')])
def test_ratios_and_targets(kind, target, ratio, met, text):
    row = make_row('a', 'b', 10., 'ms', 'peer', 20., kind, target)
    assert (row['ratio'],row['met'],ratio_text(row['ratio'], kind))==(ratio,met,text)
    assert target_text(row).endswith('missed')==(met is False)

def test_numbers_keep_their_digits():
    assert [quantity(v, 'ms') for v in (0,.01234,1.2345,123.4,12345.)]==['0 ms','0.0123 ms','1.23 ms','123 ms','12,345 ms'] and quantity(97.813, '%')=='97.81 %'

def test_a_benchmark_that_fails_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x.py', '--data', '/somewhere/data.npz', '--json', str(tmp_path/'x.json')])
    class args: json = tmp_path/'x.json'
    with pytest.raises(ZeroDivisionError), Record(args, 'CPU time') as record: record.row('a', 'b', 1., 'ms', 'peer', 0.)
    assert not list(tmp_path.iterdir())
    with Record(args, 'CPU time') as record: record.row('a', 'b|c', 1., 'ms')
    assert json.loads(args.json.read_text())['command']=='python benchmarks/x.py --data data.npz' and '| a | b\\|c | 1.00 ms | – | – |' in capsys.readouterr().out

def test_every_row_is_on_the_page_of_all():
    page = board.all_rows(dict(step_overhead=result(ROW), deploy=dict(failed='no')))
    assert '| Training step, fixed masks | mlp | 95.0 ms | dense: 100 ms | 0.950× | ≤ 1.05× | quartiles 0.900 1.00 |' in page and '## deploy' in page and 'failed: no' in page

# what was measured

RESULTS = ROOT/'benchmarks'/'results'

def test_every_benchmark_was_measured():
    found = board.load(RESULTS)
    assert list(found)==list(board.BENCHMARKS)
    for name,res in found.items(): assert board.chosen(name, res), name
    for name,b in board.BENCHMARKS.items(): assert b.quick not in found[name]['command'], name

def test_board_and_readme_are_made_of_what_was_measured():
    found = board.load(RESULTS)
    made = board.board(found)
    text = board.markdown(made)
    assert json.loads((RESULTS/'board.json').read_text(encoding='utf-8'))==made and len(made['rows'])<=45
    assert (RESULTS/'board.md').read_text(encoding='utf-8')==text and (RESULTS/'README.md').read_text(encoding='utf-8')==board.all_rows(found)
    assert text in (ROOT/'README.md').read_text(encoding='utf-8')
