"""What benchmarks share: the machine, rows of ours against a peer, Markdown of them, and JSON.

A row's `kind` says how ours and its peer are compared: `cost` is ours/peer, `speed` is peer/ours, `points` is ours - peer. A target is an expression as `ratio <= 1.02` or `ours <= 60`.
A row whose `peer` has no `value` is one whose peer isn't installed.
"""
import json, math, operator, os, platform, sys, time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import torch
from fastsparse_create.files import atomic_path

cpu_flags = 'avx2','avx512f','avx512_vnni','avx_vnni','avx512_bf16','amx_int8','asimddp','i8mm'

# the machine

def _cpuinfo():
    "What Linux says of the last processor"
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: return {}
    return {k.strip():v.strip() for k,_,v in (l.partition(':') for l in lines)}

def versions(names):
    "Of those packages that are installed"
    res = {}
    for n in names:
        try: res[n] = version(n)
        except PackageNotFoundError: continue
    return res

def machine():
    "What decides how fast things are, and no name of the machine"
    info = _cpuinfo()
    words = info.get('flags', info.get('Features', '')).split()
    return dict(cpu=info.get('model name') or platform.processor() or platform.machine(), flags=[f for f in cpu_flags if f in words], cores=os.cpu_count(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, python=platform.python_version(), **versions(['torch','fastai']))

def described(machine):
    "The machine in words"
    return ', '.join([machine['cpu'], f"{machine['cores']} cores", *filter(None, [' '.join(machine['flags']), machine['gpu']]), *(f'{n} {machine[n]}' for n in ('python','torch','fastai'))])

# Markdown

def digits(value, n=3):
    "The first `n` of them, and all before the point"
    decimals = max(0, n-1-math.floor(math.log10(abs(value)))) if value else 0
    return f'{value:,.{decimals}f}'

def quantity(value, unit): return f"{digits(value, 4 if unit=='%' else 3)} {unit}"

ratios = dict(cost=operator.truediv, speed=lambda ours,peer: peer/ours, points=operator.sub)
relations = {'<=':operator.le, '>=':operator.ge}
signs = {'<=':'≤', '>=':'≥'}

def ratio_text(value, kind):
    if kind=='points': return f'{value:+.2f} points'
    return f'{value:.3f}×' if kind=='cost' and value<10 else f'{digits(value)}×' + (' as fast' if kind=='speed' else '')

def target_text(row):
    "What the project wants, and whether it was missed"
    if not row['target']: return ''
    of,relation,number = row['target'].split()
    if of=='ours': text = f"{number} {row['unit']}"
    else: text = f'{number} points' if row['kind']=='points' else f'{number}×'
    return f'{signs[relation]} {text}' + (', missed' if row['met'] is False else '')

def peer_text(row):
    if not row['peer']: return '–'
    return f"{row['peer']}: " + ('not installed' if row['value'] is None else quantity(row['value'], row['unit']))

def cells(row):
    "What ours takes, its peer, the ratio and the target"
    return [row['what'], row['case'], quantity(row['ours'], row['unit']), peer_text(row), '–' if row['ratio'] is None else ratio_text(row['ratio'], row['kind']), target_text(row)]

def more_text(more):
    "Whatever else was measured"
    text = lambda v: digits(v) if isinstance(v, float) else ' '.join(map(text, v)) if isinstance(v, list) else str(v)
    return ', '.join(f"{k.replace('_',' ')} {text(v)}" for k,v in more.items())

columns = ['what','case','ours','peer','ratio','target']

def line(cells): return '| ' + ' | '.join(str(c).replace('|', '\\|') for c in cells) + ' |'
def head(columns): return f"{line(columns)}\n|{'---|'*len(columns)}"

# rows

def make_row(what, case, ours, unit, peer=None, value=None, kind='cost', target=None, **more):
    ratio = None if value is None else ratios[kind](ours, value)
    met = None
    if target:
        of,relation,number = target.split()
        measured = ours if of=='ours' else ratio
        if measured is not None: met = relations[relation](measured, float(number))
    return dict(what=what, case=case, ours=ours, unit=unit, peer=peer, value=value, kind=kind, ratio=ratio, target=target, met=met, more=more)

def write_json(path, data):
    "The file is there as a whole, or as it was"
    with atomic_path(path) as tmp: tmp.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)+'\n', encoding='utf-8')

def arguments(parser):
    "Arguments of a benchmark"
    parser.add_argument('--json', help='file to write the rows to')
    return parser.parse_args()

def command():
    "What was run, without the folders of files"
    args = sys.argv[1:]
    if '--json' in args: del args[(i := args.index('--json')):i+2]
    return ' '.join([f'python benchmarks/{Path(sys.argv[0]).name}', *(Path(a).name for a in args)])

class Record:
    "Rows of a benchmark, printed as they come and written if all went well"
    def __init__(self,
                 args, # Those of the benchmark
                 about, # What holds for all rows
                 n_threads=1, # Numbers of threads
                 peers=(), # Packages whose version is told if they are there
                ):
        self.path,self.rows,self.began = args.json,[],time.perf_counter()
        self.info = dict(command=command(), about=about, machine=machine(), threads=n_threads, peers=versions(peers))

    def __enter__(self):
        peers = ''.join(f', {n} {v}' for n,v in self.info['peers'].items())
        print(f"{described(self.info['machine'])}{peers}\n\n{self.info['about']}\n\n{head([*columns, 'more'])}", flush=True)
        return self

    def row(self, *args, **kwargs):
        "A row of `make_row`"
        self.rows.append(make_row(*args, **kwargs))
        print(line([*cells(self.rows[-1]), more_text(self.rows[-1]['more'])]), flush=True)

    def __exit__(self, failed, *_):
        if failed or not self.path: return
        write_json(self.path, dict(self.info, measured=date.today().isoformat(), seconds=round(time.perf_counter()-self.began), rows=self.rows))
