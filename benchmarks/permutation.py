"""How much channel permutation gains, and what it costs.

    python benchmarks/permutation.py [--pattern 2:4] [--evaluations N]

The matrices are those of ASP's permutation tests, `np.random.seed(s); np.random.rand(rows, cols)`. Efficacy is 0 for the order as it is and 100 where every
row keeps its largest scores without groups. Times are CPU seconds of one thread, the mean over the seeds and the longest.
"""
import argparse, time
import numpy as np, torch
from torchvision.models import resnet50
from fastsparse_create.permutation.apply import *
from fastsparse_create.permutation.search import *

matrices = {(32,16):range(25), (64,64):[1], (64,128):range(25), (128,64):[1], (128,256):[1], (512,512):[1], (1024,1024):[1], (2048,2048):[1]}

def search(shape, seed, n, m, n_evaluations):
    "Efficacy, share of the scores that is kept before and after, CPU seconds, and evaluations"
    np.random.seed(seed)
    w = np.random.rand(*shape)
    began = time.process_time()
    res = search_permutation(w, n, m, n_evaluations)
    seconds = time.process_time()-began
    return efficacy(w, res.permutation, n, m),res.before/w.sum(),res.after/w.sum(),seconds,res.n_evaluations

def random_matrices(n, m, n_evaluations):
    print('| matrix | seeds | efficacy, % | kept before | kept after | CPU, s | longest, s | evaluations |\n|---|---|---|---|---|---|---|---|')
    for shape,seeds in matrices.items():
        runs = np.array([search(shape, s, n, m, n_evaluations) for s in seeds])
        percent,before,after,seconds,evaluations = runs.mean(0)
        span = f'{min(seeds)} to {max(seeds)}' if len(seeds)>1 else seeds[0]
        print(f"| {shape[0]}×{shape[1]} | {span} | {percent:.2f} | {before:.5f} | {after:.5f} | {seconds:.3f} | {runs[:,3].max():.3f} | {evaluations:,.0f} |", flush=True)

def whole_model(n, m):
    torch.manual_seed(0)
    model = resnet50().eval()
    began = time.process_time()
    res = permute_channels(model, torch.randn(1,3,64,64), n, m)
    print(f'\nResNet-50 at 64×64 with its initial weights, CPU {time.process_time()-began:.1f} s: {str(res).splitlines()[-1]}')

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--pattern', default='2:4')
    p.add_argument('--evaluations', type=int, help='default: what search_permutation takes for the size')
    args = p.parse_args()
    torch.set_num_threads(1)
    n,m = map(int, args.pattern.split(':'))
    search((32,16), 0, n, m, 1000)
    print(f'{args.pattern}, numpy {np.__version__}, 1 thread\n')
    random_matrices(n, m, args.evaluations)
    whole_model(n, m)

if __name__=='__main__': main()
