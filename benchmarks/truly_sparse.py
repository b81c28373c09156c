"""Training and inference with layers that store only their connections, against dense layers and against masks.

    python benchmarks/truly_sparse.py --data cifar10_subset.tgz [--epochs 3] [--steps 102] [--sparsity 0.98]

The network is the multilayer perceptron of Mocanu et al. (2018), 3072-4000-1000-4000-10, on CIFAR-10 images: a folder or archive with `train/<class>/*` and `valid/<class>/*`.
All variants train in one process, a few steps each in turn, so that whatever else the machine does hits them alike. Times are process CPU time of one thread. *Best dense* are
dense layers on the faster of PyTorch's own matrix products and oneDNN's.
"""
import argparse, tarfile, tempfile, threading, time
import numpy as np, torch, torch.nn.functional as F
from contextlib import redirect_stdout
from io import StringIO
from fastai.vision.all import *
from fastsparse_create.criteria import random_scores
from fastsparse_create.callback.dynamic import *
from fastsparse_create.distribution import erdos_renyi_kernel
from fastsparse_create.sparse.inference import *
from fastsparse_create.sparse.linear import *
from fastsparse_create.sparsify import *
from fastsparse_create.benchmark import benchmark
from fastsparse_create.export.onnx import finished_copy
from record import Record, arguments
from step_overhead import Turns

# data

def read_images(path):
    "Training and validation images as normalized rows, and their classes"
    path = Path(path).expanduser()
    if path.is_dir(): return read_folder(path)
    with tempfile.TemporaryDirectory() as tmp:
        with tarfile.open(path) as f: f.extractall(tmp, filter='data')
        return read_folder(next(Path(tmp).rglob('train')).parent)

def read_folder(path):
    classes = sorted(d.name for d in (path/'train').iterdir())
    res = []
    for part in ('train','valid'):
        files = [(f,i) for i,c in enumerate(classes) for f in sorted((path/part/c).iterdir())]
        x = torch.tensor(np.stack([np.asarray(PILImage.create(f), dtype=np.float32) for f,_ in files])).div_(255)
        res.append((x,torch.tensor([i for _,i in files])))
    mean,std = res[0][0].mean((0,1,2)),res[0][0].std((0,1,2))
    return [((x-mean).div_(std).permute(0,3,1,2).flatten(1).contiguous(),y) for x,y in res]

class Batches:
    "Batches in an order that depends on the epoch only, or the first `n` of them"
    def __init__(self, x, y, bs, shuffle, n=None): store_attr(); self.epoch,self.size = 0,n or len(x)//bs
    def __len__(self): return self.size
    def __iter__(self):
        self.epoch += 1
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch)) if self.shuffle else torch.arange(len(self.x))
        for i in range(self.size):
            at = order[(i*self.bs)%(len(order)-self.bs+1):][:self.bs]
            yield self.x[at],self.y[at]

# models

class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)
    @staticmethod
    def backward(ctx, g):
        x,weight = ctx.saved_tensors
        dx = product(g, weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        return dx,product(g.t().contiguous(), x.t().contiguous()),g.sum(0)

def product(x, weight, bias=None): return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

class OneDNNLinear(nn.Linear):
    def forward(self, x): return _OneDNN.apply(x, self.weight, self.bias)

def mlp(sizes=(3072,4000,1000,4000,10)):
    torch.manual_seed(0)
    layers = [l for i,o in zip(sizes, sizes[1:]) for l in (nn.Linear(i,o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])

def onednn():
    model = mlp()
    for m in model:
        if isinstance(m, nn.Linear): m.__class__ = OneDNNLinear
    return model

def masked(sparsity):
    "The network with random masks of Erdős–Rényi densities, and weights with the variance for them"
    model = mlp()
    sparsify_model(model, sparsity, sparse_init_f=erdos_renyi_kernel, criterion=random_scores, reinit=True)
    return model

def sparse(sparsity):
    model = masked(sparsity)
    sparse_layers_(model)
    return model

def learner(model, train, valid=(), lr=.02):
    learn = Learner(DataLoaders(train, valid), model, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), lr=lr, metrics=accuracy)
    learn.remove_cbs([ProgressCallback])
    learn.logger = noop
    return learn

methods = {'static':lambda **kwargs: [], 'SET':lambda **kwargs: [SET(**kwargs)], 'RigL':lambda **kwargs: [RigL(**kwargs)]}

# measurements

def epoch_seconds(variants, train, n_steps, turn):
    "CPU seconds of each turn of each variant"
    turns,threads,learners = {},[],{}
    for name,(make,cbs) in variants.items():
        learners[name] = learner(make(), Batches(*train, 128, True, n_steps))
        turns[name] = Turns(turn)
        threads.append(threading.Thread(target=learners[name].fit, args=(1,), kwargs=dict(cbs=[turns[name],*cbs]), daemon=True))
    for t in threads: t.start()
    for _ in range(n_steps//turn):
        for t in turns.values():
            t.go.release()
            t.done.acquire()
    for t in threads: t.join()
    return {n:t.seconds[1:] for n,t in turns.items()},{n:megabytes(l) for n,l in learners.items()}

def megabytes(learn):
    "Of parameters, buffers and everything that the optimizer keeps"
    tensors = [*learn.model.parameters(), *learn.model.buffers(), *(v for s in learn.opt.state.values() for v in s.values() if isinstance(v, Tensor))]
    return sum(t.nbytes for t in tensors)/1e6

def compare_epochs(record, seconds, size, n_steps_epoch, turn, sparsity):
    best = min(('dense','dense, oneDNN'), key=lambda v: sum(seconds[v]))
    epoch = {v:sum(s)/len(s)/turn*n_steps_epoch for v,s in seconds.items()}
    for v in (v for v in seconds if not v.startswith('dense')):
        r = sorted(a/b for a,b in zip(seconds['dense'], seconds[v]))
        record.row(f'Epoch, {v}', f'MLP, {sparsity:.0%} sparse', epoch[v], 's', 'dense', epoch['dense'], 'speed', 'ratio >= 6' if v.startswith('sparse') else None, quartiles=[r[len(r)//4],r[3*len(r)//4]])
        record.row(f'Epoch, {v}', f'MLP, {sparsity:.0%} sparse', epoch[v], 's', 'best dense kernel', epoch[best], 'speed')
        record.row(f'Weights and momentum, {v}', f'MLP, {sparsity:.0%} sparse', size[v], 'MB', 'dense', size['dense'])

def accuracies(record, names, sparsity, data, epochs, every):
    "Accuracy of masked and sparse runs from equal seeds, and how far apart their outputs are in the end"
    for name in names:
        found = []
        for make in (masked,sparse):
            train,valid = Batches(*data[0], 128, True),Batches(*data[1], 200, False)
            learn,began = learner(make(sparsity), train, valid),time.process_time()
            learn.fit_one_cycle(epochs, .02, cbs=methods[name](every=every))
            seconds = time.process_time()-began
            with torch.no_grad(): found.append((100*learn.validate()[1],learn.model.eval()(data[1][0]),seconds))
        (a,out_a,sec_a),(b,out_b,sec_b) = found
        record.row(f'Accuracy, sparse, {name}', f'MLP, {sparsity:.0%} sparse, {epochs} epochs', b, '%', 'masks', a, 'points', largest_difference=f'{largest_difference(out_b, out_a):.1e}', CPU_s=[sec_b,sec_a])

def inference(record, size, sparsity, bs):
    torch.manual_seed(0)
    model,x = nn.Sequential(*[l for _ in range(3) for l in (nn.Linear(size,size), nn.ReLU())], nn.Linear(size,10)).eval(),torch.randn(bs, size)
    sparsify_model(model, sparsity, [f'{i}.weight' for i in (0,2,4)])
    fast,found = to_sparse_inference(model, x)
    dense,ours = benchmark(dict(dense=finished_copy(model), sparse=fast), x).rows
    record.row('Inference, sparse kernels', f'3 layers of {size}, {sparsity:.0%} sparse, batch {bs}', ours.cpu_ms, 'ms', 'dense', dense.cpu_ms, 'speed', 'ratio >= 6', kernels=', '.join(r.status for r in found.rows[:3]))

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--data', required=True, help='folder or archive of CIFAR-10 images')
    p.add_argument('--sparsity', type=float, default=.98)
    p.add_argument('--epochs', type=int, default=3, help='of the runs whose accuracy is compared; 0: none')
    p.add_argument('--steps', type=int, default=102, help='that are timed')
    p.add_argument('--turn', type=int, default=3)
    p.add_argument('--every', type=int, default=20, help='optimizer steps between updates of the connections where accuracy is compared; 100 where time is')
    p.add_argument('--sizes', nargs='+', type=int, default=[1024,4096], help='of the layers whose inference is timed')
    p.add_argument('--methods', nargs='+', default=list(methods), choices=list(methods))
    args = arguments(p)
    torch.set_num_threads(1)
    data = read_images(args.data)
    n_steps_epoch = len(data[0][0])//128
    variants = {'dense':(mlp,[]), 'dense, oneDNN':(onednn,[]), 'masks':(partial(masked, args.sparsity),[]),
                **{f'sparse, {m}':(partial(sparse, args.sparsity),methods[m](T_end=1.)) for m in args.methods}}
    with Record(args, f'CPU time; MLP 3072-4000-1000-4000-10 on CIFAR-10, batch 128, {args.steps} steps, {n_steps_epoch} steps an epoch') as record:
        with redirect_stdout(StringIO()): seconds,size = epoch_seconds(variants, data[0], args.steps, args.turn)
        compare_epochs(record, seconds, size, n_steps_epoch, args.turn, args.sparsity)
        if args.epochs: accuracies(record, args.methods, args.sparsity, data, args.epochs, args.every)
        for n in args.sizes: inference(record, n, .9, 64)

if __name__=='__main__': main()
