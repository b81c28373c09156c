"""Time and memory of N:M masks, against torch.ao.pruning.WeightNormSparsifier and sorting.

    python benchmarks/nm_masks.py [--size 4096] [--repeats 7] [--threads 1]

All rows of a table take turns in one process, so that whatever else the machine does hits them alike.
Times are the least process CPU time of all turns. The memory is NumPy's at its peak, without the mask that is returned.
"""
import argparse, time, tracemalloc, warnings
import torch
from torch import nn
from fastsparse_create.masks.core import *
from fastsparse_create.masks.nm import *

warnings.filterwarnings('ignore')

def cpu_ms(fs, repeats):
    "Least CPU time of each function, which take turns"
    best = dict.fromkeys(fs, float('inf'))
    for _ in range(repeats):
        for name,f in fs.items():
            began = time.process_time()
            f()
            best[name] = min(best[name], 1000*(time.process_time()-began))
    return best

def sparsifier(weight, n, m):
    from torch.ao.pruning import WeightNormSparsifier
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False))
    model[0].weight.data = weight
    peer = WeightNormSparsifier(sparsity_level=1., sparse_block_shape=(1,m), zeros_per_block=m-n)
    peer.prepare(model, [{'tensor_fqn':'0.weight'}])
    return lambda: peer.step()

def sorted_mask(scores, n, m):
    groups = scores.view(-1,m)
    best = groups.sort(dim=1, descending=True, stable=True).indices[:,:n]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, best, True).view(scores.shape)

def resnet50_weights():
    "Scores of the shapes that ResNet-50 prunes: all but the first convolution"
    from torchvision.models import resnet50
    with torch.device('meta'): model = resnet50()
    return [torch.rand(p.shape) for p in model.parameters() if p.ndim>1 and p.shape[1]%4==0]

def measured(name, scores):
    "The mask, and the most memory that it took to make it, in MB"
    tracemalloc.start()
    mask = get_mask_type(name).pattern(scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return mask,(peak-mask.numel())/2**20

def share(scores, mask): return ((scores*mask).sum(dtype=torch.float64)/scores.sum(dtype=torch.float64)).item()

def runs(weight, repeats):
    scores,layers = weight.abs(),resnet50_weights()
    print('| mask | CPU time, ms | times faster than WeightNormSparsifier | than a stable sort | kept magnitude |\n|---|---|---|---|---|')
    for name in ('2:4','1:4','4:8','2:8','8:16','1:16'):
        n,m = map(int, name.split(':'))
        ms = cpu_ms(dict(ours=lambda: get_mask_type(name).pattern(scores), peer=sparsifier(weight, n, m), sort=lambda: sorted_mask(scores, n, m)), repeats)
        mask = get_mask_type(name).pattern(scores)
        assert torch.equal(mask, sorted_mask(scores, n, m))
        print(f'| {name} | {ms["ours"]:.1f} | {ms["peer"]/ms["ours"]:.1f} | {ms["sort"]/ms["ours"]:.1f} | {share(scores, mask):.4f} |', flush=True)
    ms = cpu_ms({'abs':scores.abs, 'ResNet-50':lambda: [NM(2,4).pattern(w) for w in layers]}, repeats)
    print(f'\n2:4 for the {len(layers)} weights of ResNet-50 that four divides ({sum(w.numel() for w in layers)/1e6:.1f} M): {ms["ResNet-50"]:.1f} ms; '
          f'`abs` of the {scores.shape[0]} x {scores.shape[1]} weight, for scale: {ms["abs"]:.1f} ms\n')

def tiles(weight, repeats):
    scores = weight.abs()
    print('| mask | CPU time, ms | extra memory, MB | kept magnitude |\n|---|---|---|---|')
    for name in ('m4n2_2d_best','m4n2_2d_greedy','4:8-T','8:16-T','16:32-T','64:2:8'):
        ms = cpu_ms({name:lambda: get_mask_type(name).pattern(scores)}, repeats if name=='m4n2_2d_best' else 1)[name]
        mask,mb = measured(name, scores)
        print(f'| {name} | {ms:.0f} | {mb:.1f} | {share(scores, mask):.4f} |', flush=True)

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--size', type=int, default=4096)
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--threads', type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weight = torch.randn(args.size, args.size)
    print(f'torch {torch.__version__}, {args.threads} thread(s), normally distributed weights of {args.size} x {args.size}\n')
    runs(weight, args.repeats)
    tiles(weight, args.repeats)

if __name__=='__main__': main()
