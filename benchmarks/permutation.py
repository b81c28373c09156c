"""How much channel permutation gains, and what it costs.

    python benchmarks/permutation.py [--pattern 2:4] [--evaluations N]

The matrices are those of ASP's permutation tests, `np.random.seed(s); np.random.rand(rows, cols)`. Efficacy is 0 for the order as it is and 100 where every
row keeps its largest scores without groups. Times are CPU seconds of one thread, the mean over the seeds and the longest.
"""
import argparse, time
import numpy as np, torch
from torchvision.models import resnet18,resnet50
from fastsparse_create.permutation.apply import *
from fastsparse_create.permutation.search import *
from record import Record, arguments

matrices = {(32,16):range(25), (64,64):[1], (64,128):range(25), (128,64):[1], (128,256):[1], (512,512):[1], (1024,1024):[1], (2048,2048):[1]}
efficacies = {(32,16):56.8, (64,128):50, (128,64):36.2, (128,256):38, (512,512):21}
most_seconds = {(32,16):.1, (128,64):.5, (128,256):1, (512,512):10}
networks = dict(resnet18=resnet18, resnet50=resnet50)

def label(shape): return 'x'.join(map(str, shape))

def search(shape, seed, n, m, n_evaluations):
    "Efficacy, share of the scores that is kept before and after, CPU seconds, and evaluations"
    np.random.seed(seed)
    w = np.random.rand(*shape)
    began = time.process_time()
    res = search_permutation(w, n, m, n_evaluations)
    seconds = time.process_time()-began
    return efficacy(w, res.permutation, n, m),res.before/w.sum(),res.after/w.sum(),seconds,res.n_evaluations

def random_matrices(record, names, n, m, n_evaluations):
    for shape,seeds in matrices.items():
        if label(shape) not in names: continue
        runs = np.array([search(shape, s, n, m, n_evaluations) for s in seeds])
        percent,before,after,seconds,evaluations = runs.mean(0).tolist()
        of_seeds = f', mean of {len(seeds)} seeds' if len(seeds)>1 else ''
        target,limit = (f'{of} {found[shape]}' if (n,m)==(2,4) and shape in found else None for of,found in (('ours >=',efficacies),('ours <=',most_seconds)))
        record.row('Permutation, efficacy', label(shape)+of_seeds, percent, '%', 'channels as they are', 0., 'points', target, kept_before=before, kept_after=after)
        record.row('Permutation, time', label(shape)+of_seeds, seconds, 's', target=limit, longest=runs[:,3].max().item(), evaluations=round(evaluations))

def whole_model(record, name, n, m):
    torch.manual_seed(0)
    model = networks[name]().eval()
    began = time.process_time()
    res = permute_channels(model, torch.randn(1,3,64,64), n, m)
    seconds = time.process_time()-began
    record.row('Permutation, time', f'{name} at 64×64', seconds, 's', target='ours <= 60' if name=='resnet50' else None, result=str(res).splitlines()[-1])

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--pattern', default='2:4')
    p.add_argument('--evaluations', type=int, help='default: what search_permutation takes for the size')
    p.add_argument('--matrices', nargs='+', default=[*map(label, matrices)], choices=[*map(label, matrices)])
    p.add_argument('--model', default='resnet50', choices=list(networks))
    args = arguments(p)
    torch.set_num_threads(1)
    n,m = map(int, args.pattern.split(':'))
    search((32,16), 0, n, m, 1000)
    with Record(args, f'{args.pattern}; CPU time; random matrices, and a network with its initial weights') as record:
        random_matrices(record, args.matrices, n, m, args.evaluations)
        whole_model(record, args.model, n, m)

if __name__=='__main__': main()
