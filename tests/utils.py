"Small learners that train the same way each time, and the question that most tests ask: is what is masked exactly 0?"
from fastai.basics import *
from fastai.callback.all import *
from torch.utils.data import TensorDataset
from fastsparse_create.masking import *
from fastsparse_create.sparsify import *
from fastsparse_create.callback.core import *

class Tensors(TensorDataset):
    n_inp = 1
    def new_empty(self): return Tensors(*(t[:0] for t in self.tensors))

def tiny_dls(n_trn=4, bs=8, shape=(4,), d_out=2, seed=0, dtype=torch.float32):
    "The same batches in the same order in every epoch"
    g = torch.Generator().manual_seed(seed)
    def _dl(n): return DataLoader(Tensors(torch.randn(n*bs, *shape, generator=g).to(dtype), torch.randn(n*bs, d_out, generator=g).to(dtype)), bs=bs, num_workers=0)
    return DataLoaders(_dl(n_trn), _dl(1))

def mlp(d_in=4, d_hid=16, d_out=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in,d_hid), nn.ReLU(), nn.Linear(d_hid,d_hid), nn.ReLU(), nn.Linear(d_hid,d_out))

def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))

def halves(model): return [params(model[:2]), params(model[2:])]

def tiny_learner(model=None, opt_func=partial(SGD, mom=.9), lr=.05, path='.', dls=None, **kwargs):
    "A `Learner` on `tiny_dls` that prints nothing; keywords of `tiny_dls` are taken too"
    data = {k:kwargs.pop(k) for k in ('n_trn','bs','shape','d_out','seed','dtype') if k in kwargs}
    learn = Learner(dls or tiny_dls(**data), mlp() if model is None else model, loss_func=MSELossFlat(), opt_func=opt_func, lr=lr, path=path, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn

class ScaledPrecision(MixedPrecision):
    "`MixedPrecision` as it is on a GPU: losses are multiplied by a scale, gradients divided by it before the step"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.autocast('cpu', enabled=False),torch.amp.GradScaler('cpu', init_scale=2.**16, growth_interval=5)

def sparse_learner(sparsity=.6, params='__ALL_PRUNABLE__', **kwargs):
    learn = tiny_learner(**kwargs)
    sparsify_model(learn, sparsity, params)
    return learn

def weights(model): return {n:p.detach().clone() for n,p in model.named_parameters()}

def same(a, b):
    "Are two dicts of tensors equal, bit for bit?"
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def memory(opt, param):
    "All tensors of the shape of `param` that `opt` keeps for it, however it is wrapped"
    found = []
    while opt is not None:
        found += [v for v in dict(vars(opt).get('state', {})).get(param, {}).values() if torch.is_tensor(v) and v.shape==param.shape]
        for fast,slow in zip(opt.param_lists if hasattr(opt,'param_lists') else [], vars(opt).get('slow_weights') or []):
            found += [s for f,s in zip(fast,slow) if f is param]
        opt = vars(opt).get('opt')
    return found

def violations(model, opt=None):
    "What breaks the promise: names of masked weights, and of memories of them, that aren't exactly 0"
    bad = []
    for p in masked_params(model):
        masked = ~p.mask
        if p.param.detach()[masked].count_nonzero(): bad.append(p.name)
        if opt is not None: bad += [f'memory of {p.name}' for slot in memory(opt, p.param) if slot[masked].count_nonzero()]
    return bad

def n_masked(model): return sum((~p.mask).sum().item() for p in masked_params(model))

def trusted(cls):
    "`MaskEnforcer` takes `cls` for one of fastai's own callbacks, so that it need not mask after each step"
    cls.__module__ = 'fastai.callback.tests'
    return cls

@trusted
class Witness(Callback):
    "Looks after every optimizer step and every epoch, after everybody else"
    order = 1000
    def before_fit(self): self.seen,self.steps = [],0
    def after_step(self):
        self.steps += 1
        self.seen += violations(self.model, self.opt)
    def after_epoch(self): self.seen += violations(self.model, self.opt)

class Stranger(Callback): "Does nothing, but nobody knows that: `MaskEnforcer` masks after each step"

@trusted
class Note(Callback):
    "Collects what `f(self)` says at an event of training"
    run_valid = False
    def __init__(self, event, f, order=90):
        self.order,self.notes = order,[]
        setattr(self, event, lambda: self.notes.append(f(self)))

@trusted
class Interrupt(Callback):
    "Ctrl-C at one batch of training"
    order = 5
    def __init__(self, event, iter=1, epoch=0):
        self.at = iter,epoch
        setattr(self, event, self._hit)
    def _hit(self):
        if self.training and (self.iter,self.epoch)==self.at: raise KeyboardInterrupt

def until_interrupted(f, *args, **kwargs):
    "Calls `f`, which must end in an interrupt"
    try: f(*args, **kwargs)
    except KeyboardInterrupt: return
    raise AssertionError('was not interrupted')

__all__ = [n for n in globals() if not n.startswith(('_','test'))]
