"""One table of all benchmarks: ours, the peer, the ratio, and what the project wants it to be.

    python benchmarks/board.py [--only NAME ...] [--data FOLDER] [--quick]
    python benchmarks/board.py --show

Benchmarks run one after the other, each in a process of its own. Their rows stay in `benchmarks/results/NAME.json`; `board.json` and `board.md` there are the table, whose rows `BENCHMARKS` chooses, and `README.md` has
all rows. `--show` makes them from the results that are there. `--data` is the folder of `mnist.npz` and `cifar10_subset.tgz`; what needs them is left out without it. `--quick` only tries that everything runs, and needs
another folder for its results, given by `--results`.
"""
import argparse, ast, json, re, subprocess, sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from fastsparse_create.files import atomic_path
from record import cells, columns, described, head, line, more_text, write_json

HERE = Path(__file__).resolve().parent

@dataclass
class Benchmark:
    "How one is run, and what of it is on the board"
    args:str = '' # Its arguments
    quick:str = '' # Those that only try that it runs
    board:str = '' # Pattern of `what | case | peer` of the rows on the board
    data:str = '' # File that it reads
    needs:tuple = () # Packages without which it can't run

BENCHMARKS = dict(
    step_overhead=Benchmark('--models xresnet18 mlp --steps 40', '--models cnn --steps 10', r'\| (dense|fasterai.*)$|Choosing'),
    dst_step=Benchmark('', '--models mlp --steps 10 --updates 1', r'step, (RigL|dense again)|Update'),
    nm_masks=Benchmark('', '--size 256 --repeats 1', r'2:4 \|.*Sparsifier|2:4 \| ResNet|2d_best \|'),
    permutation=Benchmark('', '--matrices 32x16 --model resnet18', r'efficacy \| (32x16|64x128)|time \| resnet'),
    scaling=Benchmark('', '--millions 1 2 --repeats 1', r'(global|step) \| (2|100) M'),
    create_step=Benchmark('--models xresnet18', '--models mlp --rounds 2 --batch 8', r'initialize|teacher'),
    truly_sparse=Benchmark('', '--epochs 0 --steps 6 --sizes 256', r'Epoch, sparse.*\| dense|momentum, sparse, RigL|Inference', data='cifar10_subset.tgz'),
    qat_step=Benchmark('', '--models xresnet18 --size 64 --batch 2 --steps 2', r'QAT \|'),
    deploy=Benchmark('', '--models resnet18 --batches 1 --threads 1 --levels 0.5 --rounds 5', r"INT8 \| .*batch 1, 1 thread \| ONNX Runtime's|FLOPs, INT8 \| .*batch 1, 1 thread \| PyTorch eager|40%.*INT8 \| .*batch 1, 1 thread \| ONNX",
                     needs=('onnxruntime','onnxscript')),
    dst_accuracy=Benchmark('', '--epochs 1 --sparsities .99 --seeds 0', r'(SET|RigL|SNFS|GMP) \| .*99%', data='mnist.npz'))

def why_not(bench, data):
    "What is missing to run `bench`"
    missing = [p for p in bench.needs if not find_spec(p)]
    if missing: return f"{' and '.join(missing)} not installed"
    if bench.data and not (data and (data/bench.data).is_file()): return f'needs {bench.data} in the folder given by --data'

def run(name, bench, results, data, quick):
    "Run a benchmark, which writes its rows, or write why there are none"
    path,missing = results/f'{name}.json',why_not(bench, data)
    if missing and 'rows' in load(results).get(name, {}): return print(f'{name} {missing}: its earlier rows stay', file=sys.stderr)
    if missing: return write_json(path, dict(missing=missing))
    args = (bench.quick if quick else bench.args).split() + (['--data', str(data/bench.data)] if bench.data else [])
    done = subprocess.run([sys.executable, '-W', 'ignore', HERE/f'{name}.py', *args, '--json', path], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if not done.returncode: return
    sys.stderr.write(done.stderr)
    write_json(path, dict(failed=(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]))

def load(results):
    "Name -> what a benchmark wrote"
    paths = {n:results/f'{n}.json' for n in BENCHMARKS}
    return {n:json.loads(p.read_text(encoding='utf-8')) for n,p in paths.items() if p.is_file()}

def chosen(name, result):
    "Rows of a benchmark that are on the board"
    return [dict(benchmark=name, **r) for r in result['rows'] if re.search(BENCHMARKS[name].board, f"{r['what']} | {r['case']} | {r['peer']}")]

def board(found):
    "Machines, versions of peers and rows of all results, and why some have none"
    machines,peers,rows = defaultdict(list),defaultdict(set),[]
    for name,result in found.items():
        if 'rows' not in result:
            rows.append(dict(benchmark=name, **result))
            continue
        machines[described(result['machine'])].append(name)
        for p,v in result['peers'].items(): peers[p].add(v)
        rows += chosen(name, result)
    return dict(machines=dict(machines), peers={p:sorted(v) for p,v in peers.items()}, not_measured=[n for n in BENCHMARKS if n not in found], rows=rows)

def row_cells(row):
    if 'ours' in row: return cells(row)
    return [row['benchmark'], '', row['missing'] if 'missing' in row else f"failed: {row['failed']}", *['']*(len(columns)-3)]

def markdown(board):
    "The table, and what it was measured on; where machines differ, a column says which"
    letter = {n:'ABCDEFGHIJ'[i] for i,names in enumerate(board['machines'].values()) for n in names}
    several = len(board['machines'])>1
    rows = [line(row_cells(r) + ([letter.get(r['benchmark'], '')] if several else [])) for r in board['rows']]
    machines = [f"{letter[names[0]]}: {m} ({', '.join(names)})" for m,names in board['machines'].items()] if several else [*board['machines']]
    peers = [f"Peers: {', '.join(p+' '+' and '.join(v) for p,v in board['peers'].items())}."]*bool(board['peers'])
    lost = [f"Not measured: {', '.join(board['not_measured'])}."]*bool(board['not_measured'])
    how = 'Times are CPU time of one thread, latencies are on the clock.'
    return '\n'.join([head(columns+['machine']*several), *rows, '', '  \n'.join([*machines, how, *peers, *lost])])+'\n'

def all_rows(found):
    "Every row of every benchmark, and how it was measured"
    parts = ['# Measurements\n\nWritten by `python benchmarks/board.py`.']
    for name,result in found.items():
        parts.append(f"## {name}\n\n{ast.get_docstring(ast.parse((HERE/f'{name}.py').read_text(encoding='utf-8'))).splitlines()[0]}")
        if 'rows' not in result:
            parts.append(row_cells(dict(benchmark=name, **result))[2])
            continue
        peers = ''.join(f', {p} {v}' for p,v in result['peers'].items())
        parts.append(f"`{result['command']}`, {result['measured']}, {result['seconds']} s, number of threads: {result['threads']}\n\n{described(result['machine'])}{peers}\n\n{result['about']}")
        parts.append('\n'.join([head([*columns, 'more']), *(line([*cells(r), more_text(r['more'])]) for r in result['rows'])]))
    return '\n\n'.join(parts)+'\n'

def write_text(path, text):
    with atomic_path(path) as tmp: tmp.write_text(text, encoding='utf-8')

def show(results):
    "Write the board and all rows, and print the board"
    found = load(results)
    made = board(found)
    write_json(results/'board.json', made)
    write_text(results/'board.md', markdown(made))
    write_text(results/'README.md', all_rows(found))
    print(markdown(made), end='')
    return made

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', metavar='NAME', choices=list(BENCHMARKS), default=list(BENCHMARKS))
    p.add_argument('--data', type=Path, help='folder of mnist.npz and cifar10_subset.tgz')
    p.add_argument('--results', type=Path, default=HERE/'results')
    p.add_argument('--quick', action='store_true', help='sizes that only try that everything runs')
    p.add_argument('--show', action='store_true', help='run nothing')
    args = p.parse_args()
    if args.quick and args.results.resolve()==HERE/'results': p.error('--quick measures nothing: give another folder by --results')
    args.results.mkdir(parents=True, exist_ok=True)
    for name in [] if args.show else args.only: run(name, BENCHMARKS[name], args.results, args.data, args.quick)
    if any('failed' in r for r in show(args.results)['rows']): sys.exit(1)

if __name__=='__main__': main()
