"""Cost of a training step with dynamic sparse training, against dense training, and of one update of the masks.

    python benchmarks/dst_step.py [--models xresnet18 mlp] [--steps 120]

All variants of a model train in one process, a few steps each in turn, so that whatever else the machine does hits them alike. Times are
process CPU time. Updates fall on every 100th step, so that `--steps` above 100 includes one. *Dense again* is the same training once more: how far
its ratio is from 1 shows the noise of the machine.
"""
import argparse, time
from contextlib import redirect_stdout
from io import StringIO
from fastsparse_create.callback.dynamic import DropAndGrow
from step_overhead import *

targets = {('RigL','xresnet18'):1.02, ('RigL','mlp'):1.05, ('SNFS','xresnet18'):1.03, ('SNFS','mlp'):1.06}
variants.clear()
variants.update({'dense': lambda learn,steps: [], 'dense again': lambda learn,steps: [], 'static': lambda learn,steps: [SET(.9, fraction=0)],
                 **{f.__name__:(lambda learn,steps,f=f: [f(.9, every=100, T_end=1.)]) for f in (SET, RigL, SNFS)}})

def update_ms(method, n_updates):
    "CPU milliseconds of each update of an MLP with 12 M weights, without the step"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*64*64,960), nn.ReLU(), nn.Linear(960,256), nn.ReLU(), nn.Linear(256,10))
    batch = torch.randn(64,3,64,64),torch.randint(0,10,(64,))
    learn = Learner(DataLoaders([batch]*(2*n_updates+2), []), model, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), lr=1e-3)
    dst,seconds = method(.9, every=1 if method is RigL else 2, T_end=1.),[]  # RigL's updates take the place of one step more
    exchange = dst._exchange
    def timed():
        began = time.process_time()
        exchange()
        seconds.append(time.process_time()-began)
    dst._exchange = timed
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=dst)
    return [1000*s for s in seconds]

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--models', nargs='+', default=['xresnet18','mlp'], choices=list(models))
    p.add_argument('--variants', nargs='+', default=list(variants), choices=list(variants))
    p.add_argument('--steps', type=int, default=120)
    p.add_argument('--turn', type=int, default=5)
    p.add_argument('--updates', type=int, default=5, help='that are timed alone')
    args = arguments(p)
    torch.set_num_threads(1)
    for v in set(variants)-{'dense',*args.variants}: del variants[v]
    batch = torch.randn(64,3,64,64),torch.randint(0,10,(64,))
    with Record(args, f'CPU time; batch 64 of 3x64x64, {args.steps} steps of SGD with momentum, sparsity 0.9, updates every 100 steps; an update is the mean of some, between which the drop fraction falls') as record:
        for method in (RigL, SET, SNFS):
            ms = update_ms(method, args.updates)
            record.row(f'Update of connections, {method.__name__}', '12.0 M weights', sum(ms)/len(ms), 'ms', target='ours <= 60', each=ms)
        for name in args.models:
            with redirect_stdout(StringIO()): seconds = run(name, models[name], args.steps, args.turn, batch)
            report(record, name, models[name](), seconds, args.steps, targets)

if __name__=='__main__': main()
