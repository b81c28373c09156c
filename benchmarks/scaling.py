"""Time of a mask update and of the enforcement of a step, from 1 M to 100 M parameters: both grow as the parameters do.

    python benchmarks/scaling.py [--millions 1 3 10 30 100]

The network is a stack of square layers. An update ranks all weights by magnitude, within layers or across them, and replaces the masks of half of the weights by those of a tenth; what a step costs is that gradients and weights are masked.
Printed are nanoseconds of process CPU time for a parameter, the best of some runs; their ratio to those of the smallest network is what linear cost keeps near 1. Caches make small networks look better.
"""
import argparse, gc, time
import torch
from torch import nn
from fastsparse_create.all import *
from fastsparse_create.callback.pruning import magnitude_masks
from fastsparse_create.masks.core import Unstructured
from record import Record, arguments

def stack(n, side=1000):
    "Layers of a million weights"
    return nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(n)])

def best(f, n, before=lambda: None):
    "Seconds of the processor that the fastest of `n` runs takes"
    seconds = []
    for _ in range(n):
        before()
        start = time.process_time()
        f()
        seconds.append(time.process_time()-start)
    return min(seconds)

def update(params, is_global):
    masks = magnitude_masks(params, [.9]*len(params), Unstructured(), is_global)
    for p,m in zip(params, masks): set_mask(p, m)

def enforcement(params):
    mask_tensors([p.param.grad for p in params], [p.mask for p in params])
    mask_tensors([p.param for p in params], [p.mask for p in params])

def measure(millions, repeats):
    model = stack(millions)
    sparsify_model(model, .5)
    params,n = masked_params(model),max(2, round(repeats/millions))
    earlier = [(p.param.detach().clone(),p.mask.clone()) for p in params]
    def back():
        "To half of the weights, from which an update goes to a tenth"
        for p,(w,m) in zip(params, earlier):
            set_mask(p, m)
            p.param.data.copy_(w)
    res = {f'Mask update, {name}':best(lambda: update(params, is_global), n, back) for name,is_global in (('layer by layer',False),('global',True))}
    for p in params: p.param.grad = torch.randn_like(p.param)
    return {**res, "Masking of a step":best(lambda: enforcement(params), 5*n)}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--millions', type=int, nargs='+', default=[1,3,10,30,100])
    parser.add_argument('--repeats', type=int, default=20, help='runs of the smallest case')
    args = arguments(parser)
    torch.set_num_threads(1)
    first,*others = sorted(args.millions)
    with Record(args, 'Process CPU time of one thread, best of some runs, for each parameter; layers of 1000 x 1000') as record:
        smallest = measure(first, args.repeats)
        for m in (first,*others):
            for what,s in (smallest if m==first else measure(m, args.repeats)).items():
                record.row(what, f'{m} M parameters', s/m*1e3, 'ns', f'{first} M parameters', smallest[what]/first*1e3, seconds=s)
            gc.collect()

if __name__=='__main__': main()
