"""Accuracy of LeNet-300-100 on MNIST: static masks, SET, RigL and SNFS beside gradual magnitude pruning, at equal epochs.

    python benchmarks/dst_accuracy.py --data mnist.npz [--sparsities .98 .99] [--seeds 0 1 2] [--epochs 5]

`mnist.npz` holds `xtrain`, `ytrain`, `xtest` and `ytest` as uint8. SGD with momentum .9, weight decay 1e-4, one-cycle up to .1, batches of 128;
Erdős–Rényi, random masks, weights scaled by 1/sqrt(density), updates every 100 steps until 75 % of training, a drop fraction of .3 (SNFS: .5) that
falls along a cosine. GMP: global, from 0 at the start to the sparsity at 75 %.
"""
import argparse
import numpy as np
from fastai.basics import *
from fastai.callback.schedule import *
from fastsparse_create.all import *
from record import Record, arguments

def lenet(): return nn.Sequential(nn.Linear(784,300), nn.ReLU(), nn.Linear(300,100), nn.ReLU(), nn.Linear(100,10))

class Batches:
    "Shuffled batches of tensors, from a generator of their own"
    def __init__(self, x, y, bs, seed=None): store_attr()
    def __len__(self): return len(self.x)//self.bs if self.seed is not None else -(-len(self.x)//self.bs)
    def __iter__(self):
        if self.seed is None: order = torch.arange(len(self.x))
        else:
            order = torch.randperm(len(self.x), generator=seeded(self.seed))[:len(self)*self.bs]
            self.seed += 1_000
        for i in order.split(self.bs): yield self.x[i],self.y[i]

def load(path):
    d = np.load(path)
    x_train,x_test = (torch.from_numpy(d[k]).float().view(-1,784).div_(255).sub_(.1307).div_(.3081) for k in ('xtrain','xtest'))
    return x_train,torch.from_numpy(d['ytrain']).long(),x_test,torch.from_numpy(d['ytest']).long()

def callbacks(method, sparsity, epochs, seed):
    shared = dict(sparse_init_f=erdos_renyi, seed=seed)
    if method=='dense': return []
    if method=='GMP': return [GlobalMagnitudePruningModifier(0., sparsity, 0, .75*epochs, epochs/50)]
    if method=='static': return [SET(sparsity, fraction=0, **shared)]
    return [{'SET':SET, 'RigL':RigL, 'SNFS':SNFS}[method](sparsity, **shared)]

def run(data, method, sparsity, seed, epochs):
    "Accuracy in %, and measured sparsity"
    x,y,x_test,y_test = data
    with no_random(seed): model = lenet()
    dls = DataLoaders(Batches(x, y, 128, seed), Batches(x_test, y_test, 2_500))
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9, decouple_wd=False), wd=1e-4, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, .1, moms=(.9,.9,.9), cbs=callbacks(method, sparsity, epochs, seed))
    return 100*learn.recorder.values[-1][2],measured_sparsity(model, '__ALL_PRUNABLE__')

peers = dict(dense=None, static='dense', SET='static', RigL='SET', SNFS='static', GMP='dense')
targets = {('SET',.98):'ratio >= 0.4', ('SET',.99):'ratio >= 1.5', ('RigL',.98):'ratio >= 0.2', ('RigL',.99):'ratio >= 0.8'}

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--data', required=True)
    p.add_argument('--sparsities', nargs='+', type=float, default=[.98,.99])
    p.add_argument('--seeds', nargs='+', type=int, default=[0,1,2])
    p.add_argument('--methods', nargs='+', default=['dense','static','SET','RigL','SNFS','GMP'])
    p.add_argument('--epochs', type=int, default=5)
    args = arguments(p)
    torch.set_num_threads(1)
    data,means = load(args.data),{}
    with Record(args, f'LeNet-300-100 on MNIST, {args.epochs} epochs, accuracy, mean and sample standard deviation over seeds {args.seeds}') as record:
        for method in args.methods:
            for s in args.sparsities if method!='dense' else [0.]:
                accuracies,measured = zip(*[run(data, method, s, seed, args.epochs) for seed in args.seeds])
                mean = means[method,s] = float(np.mean(accuracies))
                value = means.get((peers[method],s), means.get((peers[method],0.)))
                peer = None if value is None else peers[method]
                record.row(f'Accuracy, {method}', f'LeNet-300-100, {s:.0%} sparse', mean, '%', peer, value, 'points', targets.get((method,s)) if peer else None,
                           deviation=float(np.std(accuracies, ddof=len(accuracies)>1)), each=list(accuracies), sparsity=float(np.mean(measured)))

if __name__=='__main__': main()
