"""Time and memory of N:M masks, against torch.ao.pruning.WeightNormSparsifier and sorting.

    python benchmarks/nm_masks.py [--size 4096] [--repeats 7] [--threads 1]

What is compared takes turns in one process, so that whatever else the machine does hits them alike.
Times are the least process CPU time of all turns. The memory is NumPy's at its peak, without the mask that is returned.
"""
import argparse, time, tracemalloc, warnings
import torch
from torch import nn
from fastsparse_create.masks.core import *
from fastsparse_create.masks.nm import *
from record import Record, arguments

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
    "PyTorch's way to N:M, if this PyTorch has it"
    try: from torch.ao.pruning import WeightNormSparsifier
    except ImportError: return {}
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False))
    model[0].weight.data = weight
    peer = WeightNormSparsifier(sparsity_level=1., sparse_block_shape=(1,m), zeros_per_block=m-n)
    peer.prepare(model, [{'tensor_fqn':'0.weight'}])
    return dict(peer=peer.step)

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

def at_4096(target, weight): return target if weight.shape==(4096,4096) else None

def runs(record, weight, repeats):
    scores,layers,case = weight.abs(),resnet50_weights(),'×'.join(map(str, weight.shape))
    for name in ('2:4','1:4','4:8','2:8','8:16','1:16'):
        n,m = map(int, name.split(':'))
        ms = cpu_ms(dict(ours=lambda: get_mask_type(name).pattern(scores), sort=lambda: sorted_mask(scores, n, m), **sparsifier(weight, n, m)), repeats)
        mask = get_mask_type(name).pattern(scores)
        assert torch.equal(mask, sorted_mask(scores, n, m))
        kept = share(scores, mask)
        record.row(f'Mask {name}', case, ms['ours'], 'ms', 'WeightNormSparsifier', ms.get('peer'), 'speed', 'ratio >= 8' if name=='2:4' else None, kept_magnitude=kept)
        record.row(f'Mask {name}', case, ms['ours'], 'ms', 'stable sort', ms['sort'], 'speed', at_4096('ours <= 60', weight) if name=='2:4' else None, kept_magnitude=kept)
    ms = cpu_ms(dict(ours=lambda: [NM(2,4).pattern(w) for w in layers], sort=lambda: [sorted_mask(w.flatten(1), 2, 4) for w in layers]), repeats)
    record.row('Mask 2:4', f'ResNet-50, {sum(w.numel() for w in layers)/1e6:.1f} M', ms['ours'], 'ms', 'stable sort', ms['sort'], 'speed', 'ours <= 60', weights=len(layers))

def tiles(record, weight, repeats):
    scores,case = weight.abs(),'×'.join(map(str, weight.shape))
    for name in ('m4n2_2d_best','m4n2_2d_greedy','4:8-T','8:16-T','16:32-T','64:2:8'):
        best = name=='m4n2_2d_best'
        ms = cpu_ms({name:lambda: get_mask_type(name).pattern(scores)}, repeats if best else 1)[name]
        mask,mb = measured(name, scores)
        record.row(f'Mask {name}', case, ms, 'ms', target=at_4096('ours <= 250', weight) if best else None, kept_magnitude=share(scores, mask))
        record.row(f'Mask {name}, extra memory', case, mb, 'MB', 'the weight', weight.nbytes/2**20, target=at_4096('ours <= 32', weight) if best else None)

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--size', type=int, default=4096)
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--threads', type=int, default=1)
    args = arguments(p)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weight = torch.randn(args.size, args.size)
    with Record(args, 'Least CPU time of some runs; normally distributed weights', args.threads) as record:
        runs(record, weight, args.repeats)
        tiles(record, weight, args.repeats)

if __name__=='__main__': main()
