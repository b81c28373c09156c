"""Broken and hostile text for everything that reads what somebody else wrote.

    python scripts/fuzz.py 1000000            # inputs, shared among all targets
    python scripts/fuzz.py 10000 csv labels   # to some targets only, --seed for others

Inputs are mutations of a corpus: parts of a seed go, are doubled, or change places with parts of another seed or with something hostile. An input joins the corpus if the
way that it takes to a message, line by line, is new. Whatever comes, a reader may raise ValueError, TypeError and OSError only, and needs less than a second of the processor and 200 MB. A failure is printed as the
call that repeats it.
"""
import argparse, atexit, json, logging, os, random, re, resource, shutil, signal, sys, tempfile, time, traceback, warnings
from pathlib import Path
import torch
from torch import nn
from fastsparse_create.all import *
from fastsparse_create.experiment import answers, layout, records, tables, text, tokens, use_case
from fastsparse_create.experiment.tables import TableOptions
from fastsparse_create.masks.core import get_mask_type
from fastsparse_create.quantization.convert import quantized_from_file
from fastsparse_create.recipe.expression import evaluate
from fastsparse_create.recipe.parse import parse_recipe, dump_recipe, shift, compose

SECONDS,MEGABYTES,CHARS = 1.,200,200_000
allowed = ValueError,TypeError,OSError

# What is read

folder = Path(tempfile.mkdtemp(prefix='fuzz', dir='/dev/shm' if os.path.isdir('/dev/shm') else None))
atexit.register(lambda owner=os.getpid(): os.getpid()==owner and shutil.rmtree(folder))  # processes that are forked leave it alone
for n in ('train','val'):
    for kind in ('images','labels'): (folder/kind/n).mkdir(parents=True)
    for i in range(3):
        (folder/'images'/n/f'{i}.png').touch()
        (folder/'labels'/n/f'{i}.txt').touch()

def net(): return nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,2))

def in_file(name, read):
    "`read` gets a file, whose text the fuzzer makes; characters that no text holds become bytes that are no UTF-8"
    def _inner(text):
        (folder/name).write_bytes(text.encode('latin-1', 'replace') if name.endswith(('.pth','.safetensors')) else text.encode('utf-8', 'surrogateescape' if not re.search('[\ud800-\udc7f\udd00-\udfff]', text) else 'replace'))
        return read(folder/name)
    return _inner

def file_of(save, name):
    save(folder/name)
    return (folder/name).read_bytes().decode('latin-1')

def sparse_net():
    model = net()
    sparsify_model(model, .5)
    return model

def recipe(text):
    data = Recipe.from_string(text).data
    parse_recipe(dump_recipe(data))
    if 'later' not in data.stages: compose(data, shift(data, 1))

def override(text): parse_recipe('a: 1\nb: x\nmodifiers:\n  - !A {x: eval(a), y: eval(b)}', variables=text)
def pattern(text): matching('re:'+text, [f'layers.{i}.{n}.weight' for i in range(9) for n in ('attention.self.query','mlp.fc1','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa')])
def selection(text): select(sparse_net(), text)
def mask_type(text): get_mask_type(text)(torch.arange(128.).view(8,16), .5)

def listed(file):
    found = tables.load_table(file)
    columns = tables.find_columns(found, TableOptions())
    if columns.split: tables.split_by_column(found, columns.split)
    tables.image_files(found.train, columns.image)
    for r in found.train: tables._one_label(r, columns)

def questions(file):
    for r in records.read_records(file, answers.answer_readers): answers._question(r, ('question','context','answers'))

def named(file):
    for r in records.read_records(file, tokens.token_readers): tokens._tags(r, 'tags', len(tokens._words(r, 'tokens')), None)

weights = dict(masks_from_file=lambda f: masks_from_file(net(), f), quantized_from_file=lambda f: quantized_from_file(net(), f))

def recipes():
    yield from [f.read_text() for f in sorted(Path(__file__).resolve().parent.parent.glob('tests/recipes/*'))]
    for kwargs in dict(sparsity=.9, num_epochs=20), dict(sparsity=.5, num_epochs=9, pruning='rigl', int8=True), dict(sparsity=.8, num_epochs=12, pruning='movement', teacher='self'): yield generate_recipe(**kwargs)
    yield 'a: &a [1, 2]\nb: *a\nn: eval(3*2**2)\ntraining_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: eval(n)\npruning_modifiers:\n  - !GMPruningModifier {init_sparsity: 0.05, final_sparsity: 0.8, start_epoch: 0, end_epoch: 5, update_frequency: 0.5, params: ["re:.*weight"], mask_type: block4}\n'
    yield '---\nversion: 1\n__metadata__: {a: b}\nstage_0:\n  q_modifiers:\n    - !QuantizationModifier\n        start_epoch: 1\nstage_1:\n  pruning_modifiers:\n    - !ACDCPruningModifier {compression_sparsity: 0.9, start_epoch: 2, end_epoch: 8, update_frequency: 1}\n---\n# Text'
    yield 'modifiers:\n  - !RigLModifier {sparsity: 0.9, update_frequency: 0.5}\n  - !StructuredPruningModifier {sparsity: .5}\n  - !SetLearningRateModifier {learning_rate: 0.1}\n  - !LearningRateFunctionModifier {lr_func: cosine, init_lr: 0.1, final_lr: 0, start_epoch: 0, end_epoch: 3}\n  - !DistillationModifier {teacher: x.pth}'

table = 'image,label,is_valid\nimages/train/0.png,cat,0\nimages/train/1.png,dog,1\n"images/train/2.png","a, b",0\n'
squad = json.dumps({'data':[{'title':'t', 'paragraphs':[{'context':'It is red.', 'qas':[{'id':'1', 'question':'How?', 'answers':[{'text':'red', 'answer_start':6}]}]}]}]})
flat = '{"question": "How?", "context": "It is red.", "answers": {"text": ["red"], "answer_start": [6]}}\n'

# Name -> share of the inputs, reader, seeds
targets = dict(
    expression=(20, lambda t: evaluate(t, dict(a=3, num_epochs=20.5, b='x')), ['num_epochs * 0.8', '2**-3 // (a+1) % 7', 'max(1, min(a, 2.5e3))', 'round(a/3, 2) - abs(-int(4.5))', 'float(a)+1_000', '((((a))))']),
    recipe=(2, recipe, list(recipes())),
    override=(6, override, ['a=1,b=2', '{"a": 2, "b": [1, {"x": null}]}', 'a: 1.5', 'b={x: [1,2]}']),
    pattern=(10, pattern, ['.*conv', r'layers\.(0|1)\..*weight$', '^(?!.*bias).*attention.*(query|key)', '[a-z0-9.]+', r'(\w+\.)*weight', '(a|a)*b', '(.{0,9}){0,9}[bc]', r'(a*)\1+']),
    selection=(3, selection, ['__ALL__', '0.weight', 're:.*weight', '2', 'module.2.weight']),
    mask_type=(6, mask_type, ['unstructured', 'block4', '[2, 4]', 'filter', '2:4', '4:8-T', 'm4n2_2d_best']),
    labels=(12, in_file('boxes.txt', layout.read_label_lines), ['0 0.5 0.5 0.25 0.25\n1 .1 .1 .2 .2\n', '3 1 1 1e-3 1\n\n', '0 0.1 0.1 0.9 0.1 0.5 0.9\n']),
    polygons=(6, in_file('polygons.txt', lambda f: layout.read_label_lines(f, 3, polygons=True)), ['0 0.1 0.1 0.9 0.1 0.5 0.9\n2 0 0 1 0 1 1 0 1\n', '0 0.5 0.5 0.25 0.25\n']),
    data_yaml=(2, in_file('data.yaml', lambda f: layout.find_labelled(f, ('labels',), ('.txt',))), ['path: .\ntrain: images/train\nval: images/val\nnames: [a, b]\n', 'train: images/train\nnc: 2\nnames:\n  0: a\n  1: b\ndownload: |\n  x\n', 'path: ../..\ntrain: images\nnames: &n [a]\nx: *n\n']),
    classes=(4, in_file('classes.txt', lambda f: layout.class_names(f.parent)), ['cat\ndog\n', '\ufeffa\r\nb c\n']),
    csv=(6, in_file('a.csv', records.read_records), [table, 'text;label\n"a ""b""";1\n', 'a,b\r\n1,2\r\n']),
    tsv=(3, in_file('a.tsv', records.read_records), ['text\tlabel\nx\t1\n"y\nz"\t0\n']),
    table=(4, in_file('images.csv', listed), [table, 'file,a,b\nimages/train/0.png,0,1\nimages/train/1.png,1,0\n', 'id,split,breed\n../x,train,q\n/etc/passwd,valid,r\n']),
    json=(6, in_file('a.json', records.read_records), ['[{"text": "a", "label": 1}, {"text": "\\u00e9", "label": null}]', '{"data": [{"a": 1.5e3}]}', '{"a": 1}\n{"a": [true, {"b": []}]}\n', squad]),
    jsonl=(6, in_file('a.jsonl', records.read_records), ['{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n', flat]),
    squad=(3, in_file('squad.json', questions), [squad, f'[{flat}]', '[{"question":"q", "context":"c", "answers":"c"}]']),
    conll=(6, in_file('a.conll', named), ['-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ O\n\nPeter B-PER\n']),
    tagged=(3, in_file('tags.jsonl', named), ['{"tokens": ["a","b"], "tags": ["O", 3]}\n', '{"tokens": "a b", "tags": "O O"}']),
    options=(6, lambda t: use_case.make_options(text.TextOptions, use_case.parse_kwargs(t)), ['{"lr": 0.001, "bs": 8}', "{'text': 'x', 'wd': 1e-2}", '{"length": 12}']),
    weights=(1, in_file('a.pth', weights['masks_from_file']), [file_of(lambda f: torch.save(sparse_net().state_dict(), f), 'a.pth')]),
    quantized=(1, in_file('q.pth', weights['quantized_from_file']), [file_of(lambda f: torch.save(net().state_dict(), f), 'q.pth')]),
    safetensors=(2, in_file('a.safetensors', lambda f: load_sparse(net(), f)), [file_of(lambda f: save_sparse(sparse_net(), f), 'a.safetensors')]))

# What comes

hostile = [*'[]{}()<>:;,.-+*/%?!&|@`#"\'~=\\ \n\t\r0189aAé', '\x00', '\ufeff', '\u2028', '\x85', '\udcff', '\U0001f600', '9**9**9**9', '10**100000', '1e999', '-0', '1_0', '0x', 'nan', '.inf', '-.inf', 'null', 'true', '~', '9'*400, '1e-400', 'eval(', '&a ', '*a', '<<: ', '!!python/object:os.system ',
           '!GMPruningModifier', '{a: 1}', '---\n', '...\n', '\n- ', '  ', ': ', '../', '..\\', '/etc/passwd', '/dev/zero', 'C:\\', '~/', '%s%n', '$(x)', '(a|a)*', '(.*)*', '{0,99}', '\\1', '(?', '(?:', '[^', '__class__', 'lambda: 0', '"\\ud800"', '\\u0000', '[[[[[[[[', '{"a":', '""', "''", ',,,', '\t\t', '😀', 're:', '__ALL__', 'modifiers:', 'inf', 'Infinity', '1:60', '0o7', '2020-01-01', 'images']

def mutated(rng, corpus):
    text = rng.choice(corpus)
    for _ in range(rng.choice((1,1,1,2,3,6))):
        i = rng.randrange(len(text)+1)
        j = min(len(text), i+rng.choice((1,1,2,5,20,100)))
        match rng.randrange(8):
            case 0: text = text[:i]+text[j:]
            case 1: text = text[:i]+text[i:j]*rng.choice((2,3,30))+text[j:]
            case 2: text = text[:i]+rng.choice(hostile)+text[i:]
            case 3: text = text[:i]+rng.choice(hostile)+text[j:]
            case 4: text = text[:i]+chr(rng.choice((rng.randrange(128), rng.randrange(256), rng.randrange(0x3000))))+text[j:]
            case 5: text = text[:i]+text[i:j][::-1]+text[j:]
            case 6:
                other = rng.choice(corpus)
                k = rng.randrange(len(other)+1)
                text = text[:i]+other[k:k+rng.choice((5,20,200))]+text[j:]
            case 7 if rng.random()<.02:
                part = rng.choice(hostile)+text[i:j]
                text = text[:i]+part*min(rng.choice((100,3000,50_000)), CHARS//len(part))+text[j:]
    return text[:CHARS]

# What must hold

class Failure(Exception): "An input did what none may do"
class _Hang(BaseException): pass

def _alarm(*_): raise _Hang

def _limit_memory():
    "Whoever needs more than `MEGABYTES` beyond what is held now gets a `MemoryError`"
    held = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmData'))
    resource.setrlimit(resource.RLIMIT_DATA, ((held<<10)+(MEGABYTES<<20), resource.RLIM_INFINITY))

def _way(e):
    "The lines that an exception came along"
    lines = []
    while e is not None: lines,e = [*lines, *((f.f_code.co_filename,n) for f,n in traceback.walk_tb(e.__traceback__))],e.__context__
    return tuple(lines)

def outcome(name, text):
    "Which way through the code an input leads to a message, and the seconds that it takes; `Failure` if it does what it may not"
    start = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 20*SECONDS)
    try:
        targets[name][1](text)
        kind = ()
    except allowed as e: kind = _way(e)
    except _Hang: raise Failure(f"hangs: check({name!r}, {text!r})") from None
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt): raise
        raise Failure(f"{type(e).__name__}: {str(e)[:200]}: check({name!r}, {text!r})") from e
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.process_time()-start
    if seconds>SECONDS: raise Failure(f"takes {seconds:.1f} s: check({name!r}, {text!r})")
    return kind,seconds

def check(name, text):
    "Does an input do what it may?"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return outcome(name, text)

def fuzz(name, n, seed=0, is_limited=False):
    "Give a target `n` inputs, which have little memory if it `is_limited`; failures, and how many ways they went"
    signal.signal(signal.SIGALRM, _alarm)
    rng,seeds = random.Random(f'{name} {seed}'),targets[name][2]
    corpus,seen,failures = list(seeds),set(),[]
    for i in range(n):
        if is_limited and i%100==0: _limit_memory()  # the corpus grows
        text = seeds[i] if i<len(seeds) else mutated(rng, corpus)
        try: kind,seconds = check(name, text)
        except Failure as e:
            failures.append(str(e))
            continue
        if kind not in seen and seconds<.02: corpus.append(text)  # slow ones would be all that there is time for
        seen.add(kind)
    return failures,len(seen)

def shares(names, n):
    "How many of at least `n` inputs each target gets"
    total = sum(targets[t][0] for t in names)
    return {t:max(len(targets[t][2]), -(-n*targets[t][0]//total)) for t in names}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('n', type=int, help='inputs')
    parser.add_argument('target', nargs='*', choices=[[], *targets], help='default: all')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    for t in targets: fuzz(t, len(targets[t][2]))  # what is imported and cached on first use counts for none
    total,failed,began = 0,0,time.perf_counter()
    for t,n in shares(args.target or list(targets), args.n).items():
        start = time.perf_counter()
        failures,kinds = fuzz(t, n, args.seed, is_limited=True)
        total,failed = total+n,failed+len(failures)
        print(f'{t:12}{n:10,} inputs{kinds:6,} ways{len(failures):6,} failures{time.perf_counter()-start:8.0f} s', flush=True)
        for f in failures[:5]: print(f'    {f[:1500]}')
    print(f'{"all":12}{total:10,} inputs{"":11}{failed:6,} failures{time.perf_counter()-began:8.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss>>10:,} MB')
    return failed>0

if __name__=='__main__': sys.exit(main())
