"""Cost of a training step with masks, against dense training and against fasterai's SparsifyCallback.

    pip install -r benchmarks/requirements.txt
    python benchmarks/step_overhead.py [--models cnn xresnet18 mlp] [--steps 100]

All variants of a model train in one process, a few steps each in turn, so that whatever else the machine does hits them alike.
Times are process CPU time.
"""
import argparse, threading, time
from contextlib import redirect_stdout
from io import StringIO
import torch
from fastai.vision.all import *
from fastsparse_create.all import *
from fastsparse_create.masks.core import keep_highest
from record import Record, arguments

def cnn():
    conv = lambda i,o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(3,32), conv(32,64), conv(64,128), conv(128,256), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256,10))

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(3*64*64,1024), nn.ReLU(), nn.Linear(1024,1024), nn.ReLU(), nn.Linear(1024,10))

models = dict(cnn=cnn, xresnet18=lambda: xresnet18(n_out=10), mlp=mlp)

class Turns(Callback):
    "Lets one training run go on for `n` steps, then the next"
    order = -100
    __module__ = 'fastsparse_create.benchmarks'  # a callback of unknown origin makes MaskEnforcer check weights after each step, as it may write to them
    def __init__(self, n): self.n,self.go,self.done,self.seconds,self.steps = n,threading.Semaphore(0),threading.Semaphore(0),[],0
    def before_batch(self):
        if self.steps%self.n==0:
            if self.steps: self._stop()
            self.go.acquire()
            self.began = time.process_time()
        self.steps += 1
    def _stop(self):
        self.seconds.append(time.process_time()-self.began)
        self.done.release()
    def after_train(self): self._stop()

def fasterai_callback(schedule):
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import Schedule, sched_agp, sched_oneshot
    from fasterai.sparse.sparsify_callback import SparsifyCallback
    schedule = Schedule(sched_agp, start_pct=0.) if schedule=='agp' else Schedule(sched_oneshot, start_pct=0.)
    return SparsifyCallback(.9, 'weight', 'local', large_final, schedule, layer_type=(nn.Conv2d,nn.Linear))

def gmp(learn, steps): return [GMPruningModifier(.05, .9, 0, 1, 100/steps)]
def fixed(learn, steps):
    sparsify_model(learn, .9)
    return []

variants = {'dense': lambda learn,steps: [], 'fixed masks': fixed, 'GMP, every 100 steps': gmp,
            'fasterai, one-shot': lambda learn,steps: [fasterai_callback('one_shot')],
            'fasterai, agp': lambda learn,steps: [fasterai_callback('agp')]}

def run(name, model_f, n_steps, turn, batch):
    torch.manual_seed(0)
    model,turns,threads = model_f(),{},[]
    for v,make in variants.items():
        dls = DataLoaders([batch]*n_steps, [])
        learn = Learner(dls, deepcopy(model), loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), lr=1e-3)
        learn.remove_cbs([ProgressCallback, Recorder])
        try: cbs = make(learn, n_steps)
        except ImportError: continue
        turns[v] = Turns(turn)
        threads.append(threading.Thread(target=learn.fit, args=(1,), kwargs=dict(cbs=[turns[v],*cbs]), daemon=True))
    for t in threads: t.start()
    for _ in range(n_steps//turn):
        for t in turns.values():
            t.go.release()
            t.done.acquire()
    for t in threads: t.join()
    return {v:t.seconds for v,t in turns.items()}

def selection_ms(select, n):
    scores,times = torch.randn(n).abs_(),[]
    for _ in range(10):
        began = time.process_time()
        select(scores, int(.9*n))
        times.append(time.process_time()-began)
    return min(times)*1000

targets = {('fixed masks','xresnet18'):1.02, ('fixed masks','mlp'):1.05, ('GMP, every 100 steps','xresnet18'):1.02, ('GMP, every 100 steps','mlp'):1.06}
peers = {'fixed masks':'fasterai, one-shot', 'GMP, every 100 steps':'fasterai, agp'}

def report(record, name, model, seconds, n_steps, targets, peers={}):
    "A row for each variant against dense training, and for those that have one against a peer"
    ms,case = {v:1000*sum(s)/n_steps for v,s in seconds.items()},f'{name}, {sum(p.numel() for p in model.parameters())/1e6:.1f} M'
    for v in (v for v in seconds if v not in ('dense',*peers.values())):
        r = sorted(a/b for a,b in zip(seconds[v], seconds['dense']))
        target = f'ratio <= {targets[v,name]}' if (v,name) in targets else None
        record.row(f'Training step, {v}', case, ms[v], 'ms', 'dense', ms['dense'], target=target, quartiles=[r[len(r)//4],r[3*len(r)//4]])
    for v,peer in peers.items(): record.row(f'Training step, {v}', case, ms[v], 'ms', peer, ms.get(peer))

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--models', nargs='+', default=list(models), choices=list(models))
    p.add_argument('--steps', type=int, default=100)
    p.add_argument('--turn', type=int, default=5)
    p.add_argument('--threads', type=int, default=1)
    args = arguments(p)
    torch.set_num_threads(args.threads)
    batch = torch.randn(64,3,64,64),torch.randint(0,10,(64,))
    with Record(args, f'CPU time; batch 64 of 3x64x64, {args.steps} steps of SGD with momentum, sparsity 0.9', args.threads, ['fasterai']) as record:
        for name in args.models:
            with redirect_stdout(StringIO()): seconds = run(name, models[name], args.steps, args.turn, batch)
            report(record, name, models[name](), seconds, args.steps, targets, peers)
        n = 12_582_912
        record.row('Choosing a mask', f'{n/1e6:.1f} M weights', selection_ms(keep_highest, n), 'ms', 'torch.kthvalue', selection_ms(lambda scores,k: scores>scores.kthvalue(k)[0], n), 'speed', 'ours <= 30')

if __name__=='__main__': main()
