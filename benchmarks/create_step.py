"""Cost of a training step of a plain loop under `create.initialize`, and with distillation, against the same loop alone.

    python benchmarks/create_step.py [--models xresnet18 resnet18] [--size 64] [--batch 32] [--rounds 20]

All variants take turns, one step of each after the other, in one process with one thread; medians of process CPU time. A step with distillation is compared to the student's step plus the
teacher's forward pass, which is the least that it can cost.
"""
import argparse,logging,time,torch
from copy import deepcopy
from statistics import median
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models import resnet18
import fastsparse_create as sparsify
from record import Record, arguments

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(3072,2048), nn.ReLU(), nn.Linear(2048,2048), nn.ReLU(), nn.Linear(2048,10))

models = dict(resnet18=lambda: resnet18(num_classes=10), xresnet18=lambda: xresnet18(n_out=10), mlp=mlp)

def stepper(model, batch, **kwargs):
    "A function that trains one step"
    model = deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=.001, momentum=.9)
    manager = sparsify.create.initialize(model, optimizer, 1000, pruning=None, quantization=False, recipe_variables=dict(init_lr=.001), **kwargs)[0] if kwargs else None
    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        return manager  # which lives as long as somebody holds it
    return step

def forward(model, x):
    model = deepcopy(model).eval()
    def f():
        with torch.no_grad(): model(x)
    return f

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--models', nargs='+', default=['xresnet18','resnet18','mlp'], choices=list(models))
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--rounds', type=int, default=20)
    args = arguments(p)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with Record(args, f'CPU time, medians of {args.rounds} steps; batch {args.batch}, images of 3x{args.size}x{args.size}, of 3x32x32 for the mlp') as record:
        for name in args.models:
            torch.manual_seed(0)
            size = 32 if name=='mlp' else args.size
            model,batch = models[name](),(torch.randn(args.batch,3,size,size),torch.randint(0, 10, (args.batch,)))
            turns = dict(plain=stepper(model, batch), managed=stepper(model, batch, lr='linear'), distilled=stepper(model, batch, distillation=True, distillation_teacher=deepcopy(model)), teacher=forward(model, batch[0]))
            ms = {k:[] for k in turns}
            for i in range(args.rounds+2):
                for k,f in turns.items():
                    start = time.process_time()
                    f()
                    if i>1: ms[k].append(1000*(time.process_time()-start))
            t = {k:median(v) for k,v in ms.items()}
            record.row('Plain loop, initialize', name, t['managed'], 'ms', 'the loop alone', t['plain'])
            record.row('Plain loop, distillation', name, t['distilled'], 'ms', 'the loop alone', t['plain'])
            record.row('Plain loop, distillation', name, t['distilled'], 'ms', "loop and teacher's forward pass", t['plain']+t['teacher'])

if __name__=='__main__': main()
