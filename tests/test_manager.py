"A plain loop under `LoopManager` does what `learn.fit` does with the same callbacks, bit for bit"
import io,pytest,warnings
from copy import deepcopy
from functools import partial
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation,GradientClip
from torch.optim.lr_scheduler import ExponentialLR,OneCycleLR,StepLR
from utils import *
from fastsparse_create.callback.dynamic import *
from fastsparse_create.callback.learning_rate import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.structured import *
from fastsparse_create.callback.training import *
from fastsparse_create.create.manager import *
from fastsparse_create.recipe.compile import Recipe
from fastsparse_create.sparse.linear import *

n_iter,n_epoch = 8,4
sgd,adam = partial(torch.optim.SGD, lr=.05, momentum=.9, weight_decay=1e-3),partial(torch.optim.Adam, lr=.01, weight_decay=1e-3)
mse = MSELossFlat()

def batches(n=n_iter, bs=8):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(bs, 4, generator=g),torch.randn(bs, 2, generator=g)) for _ in range(n)]

def snapshot(model, opt):
    "Weights, masks and everything that the optimizer remembers, as one dict"
    state = {k:v.clone() for k,v in model.state_dict().items()}
    for i,pg in enumerate(opt.param_groups):
        state |= {f'{k} of group {i}':torch.as_tensor(v) for k,v in pg.items() if isinstance(v, float)}
        for j,p in enumerate(pg['params']):
            state |= {f'{k} of {i},{j}':torch.as_tensor(v).clone() for k,v in opt.state.get(p, {}).items() if v is not None}
    return state

def by_fit(opt_func, cbs, data=None, prepare=noop, epochs=n_epoch, extra=()):
    "Snapshots after each epoch of `learn.fit`"
    model,data,seen = mlp(),data or batches(),[]
    prepare(model)
    opt = opt_func(model.parameters())
    note = trusted(type('Note', (Callback,), dict(order=1000, after_epoch=lambda self: seen.append(snapshot(model, opt)))))()
    learn = Learner(DataLoaders(data, data[:1], device='cpu'), model, loss_func=mse, opt_func=OptimWrapper(opt=opt), lr=opt.param_groups[0]['lr'])
    learn.logger = noop
    with learn.no_bar(): learn.fit(epochs, cbs=[*cbs(), *extra, note])
    return seen

def plain_steps(model, opt, data, n_acc=1, scaler=None, scheduler=None):
    "One epoch of somebody's loop"
    for i,(xb,yb) in enumerate(data):
        if i%n_acc==0: opt.zero_grad()
        loss = mse(model(xb), yb)/n_acc
        (scaler.scale(loss) if scaler else loss).backward()
        if i%n_acc<n_acc-1: continue
        if scaler:
            scaler.step(opt)
            scaler.update()
        else: opt.step()
        if scheduler: scheduler.step()

def validated(model, data):
    model.eval()
    with torch.no_grad(): loss = mse(model(data[0][0]), data[0][1])
    model.train()
    return loss

def managed(opt_func, cbs, steps=n_iter, epochs=n_epoch, prepare=noop, model=None):
    model = model or mlp()
    prepare(model)
    opt = opt_func(model.parameters())
    return model,opt,LoopManager(model, opt, steps, epochs, cbs())

def by_loop(opt_func, cbs, data=None, prepare=noop, epochs=n_epoch, n_acc=1, scaler=None):
    data,seen = data or batches(),[]
    model,opt,manager = managed(opt_func, cbs, len(data)//n_acc, epochs, prepare)
    for epoch in range(manager.max_epochs):
        plain_steps(model, opt, data, n_acc, scaler)
        validated(model, data)
        seen.append(snapshot(model, opt))
    manager.finalize()
    return seen

def assert_equal_epochs(a, b):
    assert len(a)==len(b)
    for epoch,(x,y) in enumerate(zip(a, b)):
        assert x.keys()==y.keys()
        assert [k for k in x if not torch.equal(x[k], y[k])]==[], f'epoch {epoch}'

def some_zeros(model):
    with torch.no_grad(): model[2].weight.mul_((torch.arange(256)%3==0).view(16,16))

def masked(model): sparsify_model(model, .6)

def stored_sparsely(model):
    sparsify_model(model, .6)
    sparse_layers_(model, .5, 0)

cases = dict(
    nothing       = lambda: [],
    gmp           = lambda: [GMPruningModifier(.05, .8, .5, 3., .25)],
    gmp_every     = lambda: [GMPruningModifier(.05, .8, 0., 4., -1)],
    gmp_from_param= lambda: [GMPruningModifier('__FROM_PARAM__', .8, 1., 3., 1.)],
    gmp_released  = lambda: [GMPruningModifier(.05, .8, 0., 2., .5, leave_enabled=False)],
    glob          = lambda: [GlobalMagnitudePruningModifier(.05, .8, 0., 3., .5)],
    nm            = lambda: [MagnitudePruningModifier(0., .5, 0., 3., .5, ['2.weight'], mask_type='2:4')],
    constant      = lambda: [ConstantPruningModifier(['2.weight'], start_epoch=1., end_epoch=3.)],
    set_lr        = lambda: [SetLearningRateModifier(.02, start_epoch=1.5)],
    lr_function   = lambda: [LearningRateFunctionModifier('cosine', .05, .001, .5, 3.5)],
    lr_cyclic     = lambda: [LearningRateFunctionModifier('cyclic_linear', .05, .001, 0., 4., cycle_epochs=1.5)],
    lr_steps      = lambda: [LearningRateModifier('StepLR', dict(gamma=.5, step_size=1.), start_epoch=0.)],
    weight_decay  = lambda: [SetWeightDecayModifier(.1, start_epoch=1.)],
    trainable     = lambda: [TrainableParamsModifier(['0.weight'], False, start_epoch=1., end_epoch=2.)],
    set_param     = lambda: [SetParamModifier(['0.bias'], .5, start_epoch=1.)],
    gradual_param = lambda: [GradualParamModifier(['0.bias'], 0., 1., 1., 3., .25)],
    epochs        = lambda: [EpochRangeModifier(0., 4.)],
    clip          = lambda: [GMPruningModifier(.05, .8, 0., 3., .5), GradientClip(.05)],
    together      = lambda: [GMPruningModifier(.05, .8, .5, 3., .25, ['0.weight','2.weight']), LearningRateFunctionModifier('linear', .05, .001, 1., 4.),
                             TrainableParamsModifier(['4.weight'], False, start_epoch=1., end_epoch=2.), SetWeightDecayModifier(.1, start_epoch=2.)],
    rigl          = lambda: [RigL(.6, every=3)],
    rigl_epochs   = lambda: [RigL(.6, every=.5, schedule='constant')],
    set           = lambda: [SET(.6, every=3)],
    snfs          = lambda: [SNFS(.6, every=5, num_grads=3)],
    rigl_clip     = lambda: [RigL(.6, every=3), GradientClip(.05)],
    rigl_lr       = lambda: [RigL(.6, every=3), LearningRateFunctionModifier('cosine', .05, .001, .5, 3.5)],
    without_layer = lambda: [LayerPruningModifier('2', .5)],
    put_back      = lambda: [LayerPruningModifier('2', .5, 2.5)],
    masked_layer  = lambda: [GlobalMagnitudePruningModifier(.05, .8, 0., 3., .5), LayerPruningModifier('2', .75, 2.5)],
    custom        = lambda: [DynamicSparseTrainingCallback(.6, every=3, replace_step=False, schedule='linear', T_end=1.)],
)

@pytest.mark.parametrize('opt_func', [sgd,adam], ids=['sgd','adam'])
@pytest.mark.parametrize('name', cases)
def test_equals_fit(name, opt_func):
    prepare = some_zeros if name=='constant' else noop
    fitted,looped = by_fit(opt_func, cases[name], prepare=prepare),by_loop(opt_func, cases[name], prepare=prepare)
    assert_equal_epochs(fitted, looped)
    if name in ('gmp','rigl','set','snfs'): assert fitted[-1]['2.weight_mask'].sum()<150

dynamic = dict(rigl=lambda: [RigL(every=3)], set=lambda: [SET(every=3)], snfs=lambda: [SNFS(every=5, num_grads=3)])

@pytest.mark.parametrize('name', ['nothing','rigl','set','snfs','constant','lr_function'])
def test_equals_fit_with_sparsify_model(name):
    cbs = {**cases, **dynamic}[name]
    assert_equal_epochs(by_fit(sgd, cbs, prepare=masked), by_loop(sgd, cbs, prepare=masked))

@pytest.mark.parametrize('opt_func', [sgd,adam], ids=['sgd','adam'])
@pytest.mark.parametrize('name', dynamic)
def test_layers_that_are_stored_sparsely(name, opt_func):
    seen = by_loop(opt_func, dynamic[name], prepare=stored_sparsely)
    assert not torch.equal(seen[0]['2.col_indices'], seen[2]['2.col_indices'])
    assert_equal_epochs(by_fit(opt_func, dynamic[name], prepare=stored_sparsely), seen)

@pytest.mark.parametrize('opt_func', [partial(torch.optim.AdamW, lr=.01), partial(torch.optim.RMSprop, lr=.001, momentum=.9), partial(torch.optim.Adam, lr=.01, fused=True),
                                      partial(torch.optim.SGD, lr=.05, nesterov=True, momentum=.9)])
@pytest.mark.parametrize('name', ['gmp','rigl'])
def test_other_optimizers(name, opt_func): assert_equal_epochs(by_fit(opt_func, cases[name]), by_loop(opt_func, cases[name]))

def test_one_cycle_as_callback():
    "`ParamScheduler` counts in `pct_train`"
    from fastai.callback.schedule import ParamScheduler,combined_cos
    cbs = lambda: [ParamScheduler({'lr':combined_cos(.25, .01, .05, 1e-4)}), GMPruningModifier(.05, .8, 0., 3., .5)]
    assert_equal_epochs(by_fit(sgd, cbs), by_loop(sgd, cbs))

def test_user_defined_modifier_sees_dense_gradients():
    "What looks before `MaskEnforcer` does, and doesn't say when it needs dense gradients, always gets them"
    def norms(run):
        seen = []
        class Look(Callback):
            order = 10.3
            def before_step(self): seen.append([p.param.grad.norm().item() for p in masked_params(self.learn.model)])
        run(sgd, lambda: [Look(), GMPruningModifier(.5, .8, 0., 3., .5)])
        return seen
    assert norms(by_fit)==norms(by_loop)

# accumulation

@pytest.mark.parametrize('opt_func', [sgd,adam], ids=['sgd','adam'])
@pytest.mark.parametrize('name', ['nothing','gmp','rigl','set','snfs','weight_decay','trainable'])
def test_accumulation(name, opt_func):
    "`steps_per_epoch` counts optimizer steps; `fit` counts batches, so that its schedules may stand between two steps"
    cbs = {'rigl':lambda: [RigL(.6, every=3)], 'set':lambda: [SET(.6, every=3)], 'snfs':lambda: [SNFS(.6, every=5, num_grads=3)]}.get(name, cases[name])
    class Accumulate(GradientAccumulation):
        def after_loss(self): self.learn.loss_grad = self.learn.loss_grad/2
    looped = by_loop(opt_func, cbs, n_acc=2)
    data = batches()
    class DL(list): bs = 8
    assert_equal_epochs(by_fit(opt_func, cbs, data=DL(data), extra=[trusted(Accumulate)(16)]), looped)

# mixed precision

@pytest.mark.parametrize('name', ['nothing','gmp','rigl','snfs','together'])
def test_disabled_scaler(name):
    assert_equal_epochs(by_fit(sgd, cases[name]), by_loop(sgd, cases[name], scaler=torch.amp.GradScaler('cpu', enabled=False)))

@pytest.mark.parametrize('opt_func', [sgd, partial(torch.optim.Adam, lr=.01), partial(torch.optim.Adam, lr=.01, fused=True), partial(torch.optim.SGD, lr=.05, momentum=.9, fused=True)],
                         ids=['sgd','adam','fused adam','fused sgd'])
@pytest.mark.parametrize('name', ['nothing','gmp','rigl','set','snfs','together'])
def test_scaled(name, opt_func):
    "Scales are powers of 2, so that nothing is rounded"
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=5)
    assert_equal_epochs(by_fit(opt_func, cases[name]), by_loop(opt_func, cases[name], scaler=scaler))
    assert scaler.get_scale()>2.**10

@pytest.mark.parametrize('fused', [False,True])
@pytest.mark.parametrize('name', ['nothing','gmp','rigl','set','snfs','together'])
def test_overflows_are_no_steps(name, fused):
    assert_skips_overflows(partial(torch.optim.SGD, lr=.05, momentum=.9, fused=fused), cases[name])

@pytest.mark.parametrize('set_to_none', [False,True])
@pytest.mark.parametrize('name', ['rigl','set'])
def test_overflows_with_layers_that_are_stored_sparsely(name, set_to_none):
    "What these layers collect is scaled as the loss was, which an average over changing scales (SNFS) notices, and an order (RigL) doesn't"
    assert_skips_overflows(sgd, dynamic[name], stored_sparsely, set_to_none)

def assert_skips_overflows(opt_func, cbs, prepare=noop, set_to_none=True):
    "A run with batches that overflow equals the run without these batches; what was due is due at the next step"
    data,overflown = batches(),(0,2,5,11,12,19)
    expected = by_loop(opt_func, cbs, prepare=prepare, scaler=torch.amp.GradScaler('cpu', init_scale=2.**10))
    model,opt,manager = managed(opt_func, cbs, prepare=prepare)
    scaler,seen,stream = torch.amp.GradScaler('cpu', init_scale=2.**10),[],[b for _ in range(n_epoch) for b in data]
    for i in sorted(overflown, reverse=True): stream.insert(i, (data[0][0],torch.full((8,2), math.inf)))
    for xb,yb in stream:
        opt.zero_grad(set_to_none)
        scaler.scale(mse(model(xb), yb)).backward()
        before,steps = snapshot(model, opt),manager.steps
        scaler.step(opt)
        scaler.update()
        assert (manager.steps==steps)==bool(yb.isinf().any())
        if yb.isinf().any(): assert_equal_epochs([before], [snapshot(model, opt)])
        elif manager.steps%n_iter==0: seen.append(snapshot(model, opt))
    assert_equal_epochs(expected, seen)

def test_skipped_steps_at_the_end_are_made_up_for():
    "Two of 32 steps overflow: the clock is short of the end, where the last update is due"
    model,opt,manager = managed(sgd, lambda: [GMPruningModifier(.05, .8, 0., 4., 1.)])
    for _ in range(n_epoch): plain_steps(model, opt, batches())
    short,opt2,manager2 = managed(sgd, lambda: [GMPruningModifier(.05, .8, 0., 4., 1.)])
    for epoch in range(n_epoch): plain_steps(short, opt2, batches()[2*(epoch==0):])
    assert manager2.steps==30 and n_masked(short)<n_masked(model)
    manager2.finalize()
    assert n_masked(short)==n_masked(model)

# loops as they are

def test_validation_sees_the_epoch_that_it_follows():
    model,opt,manager = managed(sgd, lambda: [GMPruningModifier(.1, .8, 0., 2., 1.)])
    found = []
    for _ in range(3):
        plain_steps(model, opt, batches())
        validated(model, batches())
        found.append(measured_sparsity(model))
    assert [round(f, 2) for f in found]==[.1,.71,.8]

def test_steps_between_forward_passes():
    "Validation in training mode under no_grad opens no batch either"
    model,opt,manager = managed(sgd, lambda: [MagnitudePruningModifier(.5, .8, 0., 2., 1.)])
    with torch.no_grad(): model(batches()[0][0])
    assert measured_sparsity(model)==0
    model(batches()[0][0])
    assert abs(measured_sparsity(model)-.5)<.01

@pytest.mark.parametrize('name', ['gmp','rigl','together'])
def test_longer_than_planned(name):
    model,opt,manager = managed(sgd, cases[name], epochs=n_epoch)
    for _ in range(n_epoch): plain_steps(model, opt, batches())
    masks,lr = {p.name:p.mask.clone() for p in masked_params(model)},opt.param_groups[0]['lr']
    for _ in range(3):
        plain_steps(model, opt, batches())
        assert same(masks, {p.name:p.mask for p in masked_params(model)}) and violations(model, opt)==[]
    manager.finalize()
    assert same(masks, {p.name:p.mask for p in masked_params(model)})
    assert manager.epoch==n_epoch+3

def test_stopped_early(caplog):
    model,opt,manager = managed(sgd, lambda: [GMPruningModifier(.05, .8, 0., 4., 1.)])
    plain_steps(model, opt, batches())
    before = n_masked(model)
    manager.finalize()
    assert n_masked(model)==before and 'training ends after 1 of 4 epochs' in caplog.text

def test_finalize_gives_everything_back():
    model,opt = mlp(),None
    opt = sgd(model.parameters())
    manager = LoopManager(model, opt, n_iter, 1, GMPruningModifier(.05, .8, 0., 1., .5))
    assert 'step' in vars(opt)
    plain_steps(model, opt, batches())
    manager.finalize()
    manager.finalize()
    assert 'step' not in vars(opt) and begin_batch not in model._forward_pre_hooks.values()
    masks = {p.name:p.mask.clone() for p in masked_params(model)}
    plain_steps(model, opt, batches())
    assert violations(model)==[] and same(masks, {p.name:p.mask for p in masked_params(model)})
    LoopManager(model, opt, n_iter, 1)

def test_one_manager_each():
    model,opt,manager = managed(sgd, list)
    with pytest.raises(ValueError, match='this model has a manager'): LoopManager(model, sgd(model.parameters()), 8, 1)
    with pytest.raises(ValueError, match='this optimizer has a manager'): LoopManager(nn.Sequential(model), opt, 8, 1)

def test_two_models_in_one_loop():
    alone = by_loop(sgd, cases['rigl'])
    (a,opt_a,man_a),(b,opt_b,man_b) = managed(sgd, cases['rigl']),managed(adam, cases['gmp'])
    for _ in range(n_epoch):
        for xb,yb in batches():
            for opt in opt_a,opt_b: opt.zero_grad()
            (mse(a(xb), yb)+mse(b(xb), yb)).backward()
            for opt in opt_a,opt_b: opt.step()
    assert_equal_epochs([alone[-1]], [snapshot(a, opt_a)])
    assert violations(b, opt_b)==[]

def test_nothing_is_kept_alive():
    import gc,weakref
    model,opt,manager = managed(sgd, cases['gmp'])
    plain_steps(model, opt, batches())
    refs = [weakref.ref(o) for o in (model,manager)]
    del model,opt,manager
    gc.collect()
    assert [r() for r in refs]==[None,None]

def test_copies_of_the_model_are_free():
    model,opt,manager = managed(sgd, cases['rigl'])
    model(batches()[0][0])
    average = deepcopy(model)
    average.train()(batches()[0][0]).sum().backward()
    opt2 = deepcopy(opt)
    assert 'step' not in vars(opt2) and manager.steps==0
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell()<100_000

def test_clipping_in_the_loop_sees_masked_gradients():
    model,opt,manager = managed(sgd, list, prepare=masked)
    xb,yb = batches()[0]
    mse(model(xb), yb).backward()
    assert all(not p.param.grad[~p.mask].any() for p in masked_params(model))

@pytest.mark.parametrize('set_to_none', [True,False])
def test_zero_grad_anywhere(set_to_none):
    expected = by_loop(sgd, cases['rigl'])[-1]
    model,opt,manager = managed(sgd, cases['rigl'])
    for _ in range(n_epoch):
        for xb,yb in batches():
            mse(model(xb), yb).backward()
            opt.step()
            opt.zero_grad(set_to_none=set_to_none)
    got = snapshot(model, opt)
    assert all(torch.equal(expected[k], got[k]) for k in expected if not k.endswith('.grad'))

# forward passes that aren't seen

@pytest.mark.parametrize('forward', ['eval','parts'])
def test_unseen_forward_passes(forward):
    "After a step without a forward pass before it, batches are opened by the step before; masks and gradients are the same from then on"
    def run(name):
        model,opt,manager = managed(sgd, cases[name])
        if forward=='eval': model.eval()
        for _ in range(n_epoch):
            for xb,yb in batches():
                opt.zero_grad()
                out = model(xb) if forward=='eval' else model[2:](model[:2](xb))
                mse(out, yb).backward()
                opt.step()
                assert violations(model, opt)==[]
        manager.finalize()
        return model
    assert n_masked(run('gmp'))==n_masked(managed_run('gmp'))
    assert n_masked(run('rigl'))==n_masked(managed_run('rigl'))

def managed_run(name):
    model,opt,manager = managed(sgd, cases[name])
    for _ in range(n_epoch): plain_steps(model, opt, batches())
    manager.finalize()
    return model

def test_bare_steps(caplog):
    "Steps without forward pass and gradient count as steps"
    model,opt,manager = managed(sgd, lambda: [GMPruningModifier(.05, .8, 0., 3., .5)])
    for _ in range(n_iter*n_epoch+1): opt.step()
    assert abs(measured_sparsity(model)-.8)<.01
    assert caplog.text.count('before loss.backward()')==1

# closures

def test_closure():
    def run(opt_func, cbs, with_closure):
        model,opt,manager = managed(opt_func, cbs)
        losses = []
        for _ in range(n_epoch):
            for xb,yb in batches():
                def closure():
                    opt.zero_grad()
                    loss = mse(model(xb), yb)
                    loss.backward()
                    return loss
                if with_closure: losses.append(opt.step(closure))
                else:
                    losses.append(closure())
                    assert opt.step() is None
        return snapshot(model, opt) | {'losses':torch.stack(losses).detach()}
    for name in 'gmp','rigl','snfs': assert_equal_epochs([run(sgd, cases[name], False)], [run(sgd, cases[name], True)])

def test_lbfgs():
    def run(is_managed):
        model = mlp()
        sparsify_model(model, .6)
        opt = torch.optim.LBFGS(model.parameters(), lr=.1, max_iter=4)
        if is_managed: LoopManager(model, opt, 8, 1)
        for xb,yb in batches():
            def closure():
                opt.zero_grad()
                loss = mse(model(xb), yb)
                loss.backward()
                return loss
            opt.step(closure)
        return weights(model)
    assert same(run(False), run(True))

# the optimizer stays what it is

def test_optimizer_is_transparent():
    model = mlp()
    opt = sgd(model.parameters())
    manager = LoopManager(model, opt, n_iter, n_epoch, cases['gmp']())
    assert type(opt) is torch.optim.SGD and manager.optimizer is opt and opt.defaults['momentum']==.9
    plain_steps(model, opt, batches())
    state = deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    plain_steps(model, opt, batches())
    extra = nn.Linear(2,2)
    opt.add_param_group(dict(params=extra.parameters(), lr=.3))
    plain_steps(model, opt, batches())
    assert violations(model, opt)==[] and len(opt.param_groups)==2

@pytest.mark.parametrize('made', ['before','after'])
@pytest.mark.parametrize('scheduler', [lambda o: StepLR(o, 5, .5), lambda o: OneCycleLR(o, .1, total_steps=n_iter*n_epoch)])
def test_schedulers_of_the_loop(made, scheduler):
    def run(is_managed, cbs=()):
        model = mlp()
        opt = sgd(model.parameters())
        s = scheduler(opt) if made=='before' else None
        manager = LoopManager(model, opt, n_iter, n_epoch, cbs) if is_managed else None
        s = s or scheduler(opt)
        lrs = []
        for _ in range(n_epoch):
            for b in batches():
                plain_steps(model, opt, [b], scheduler=s)
                lrs.append(opt.param_groups[0]['lr'])
        if manager: manager.finalize()
        plain_steps(model, opt, batches())
        return snapshot(model, opt),lrs
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        (expected,lrs),(got,got_lrs),(_,pruned_lrs) = run(False),run(True),run(True, GMPruningModifier(.05, .8, 0., 3., .5))
    assert_equal_epochs([expected], [got])
    assert lrs==got_lrs==pruned_lrs

def test_lr_modifiers_win_inside_of_their_window():
    model,opt,manager = managed(sgd, lambda: [LearningRateFunctionModifier('linear', .5, .1, 1., 2.)])
    scheduler = ExponentialLR(opt, .9)
    used = []
    opt.register_step_pre_hook(lambda o,*_: used.append(o.param_groups[0]['lr']))
    for _ in range(3): plain_steps(model, opt, batches(), scheduler=scheduler)
    assert used[:2]==[.05,.05*.9] and used[8:10]==[.5,.45] and used[16]==.1 and used[17]<.1

def test_learning_rates_are_recorded():
    model,opt,manager = managed(sgd, cases['lr_function'])
    for _ in range(n_epoch): plain_steps(model, opt, batches())
    learn_lrs = manager.recorder.lrs
    assert len(learn_lrs)==n_iter*n_epoch and learn_lrs[-1]==.001

def test_updates_are_recorded():
    model,opt,manager = managed(sgd, cases['rigl'])
    for _ in range(n_epoch): plain_steps(model, opt, batches())
    updates = manager.recorder.mask_updates
    assert len(updates)>3 and updates[0].batch==3 and len(manager.recorder.sparsities)==n_iter*n_epoch

def test_unmanaged_loop_is_not_changed():
    def run(is_managed, opt_func):
        model = mlp()
        model.insert(2, nn.Dropout(.3))
        model.insert(1, nn.BatchNorm1d(16))
        opt = opt_func(model.parameters())
        if is_managed: LoopManager(model, opt, n_iter, n_epoch)
        torch.manual_seed(5)
        for _ in range(n_epoch): plain_steps(model, opt, batches())
        return snapshot(model, opt) | {'random':torch.rand(3)}
    for opt_func in sgd,adam: assert_equal_epochs([run(False, opt_func)], [run(True, opt_func)])

# resuming

without = 'without_layer','put_back','masked_layer'  # a file of weights lacks what the model is without

@pytest.mark.parametrize('at,first', [(1,'model'), (8,'manager'), (13,'manager'), (16,'model'), (21,'model'), (30,'manager')])
@pytest.mark.parametrize('name', [n for n in cases if n!='clip'])
def test_resumed(name, at, first): assert_resumes(cases[name], at, 'manager' if name in without else first, some_zeros if name=='constant' else noop)

@pytest.mark.parametrize('at,first', [(7,'model'), (10,'manager'), (16,'manager')])
@pytest.mark.parametrize('name', dynamic)
@pytest.mark.parametrize('prepare', [masked,stored_sparsely])
def test_resumed_with_masks_of_before(prepare, name, at, first): assert_resumes(dynamic[name], at, first, prepare)

def assert_resumes(cbs, at, first, prepare):
    opt_func = sgd if at%2 else adam
    stream = [b for _ in range(n_epoch) for b in batches()]
    model,opt,manager = managed(opt_func, cbs, prepare=prepare)
    plain_steps(model, opt, stream[:at])
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(), opt=opt.state_dict(), manager=manager.state_dict()), file)
    plain_steps(model, opt, stream[at:])
    manager.finalize()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again,opt2,manager2 = managed(opt_func, cbs, prepare=prepare)
    if first=='manager': manager2.load_state_dict(saved['manager'])
    again.load_state_dict(saved['model'])
    opt2.load_state_dict(saved['opt'])
    if first=='model': manager2.load_state_dict(saved['manager'])
    assert manager2.epoch==at/n_iter
    plain_steps(again, opt2, stream[at:])
    manager2.finalize()
    assert_equal_epochs([snapshot(model, opt)], [snapshot(again, opt2)])
    assert [p.requires_grad for p in model.parameters()]==[p.requires_grad for p in again.parameters()]

def test_resumed_for_longer():
    "A longer plan is no error: what was done stays done"
    model,opt,manager = managed(sgd, cases['gmp'], epochs=4)
    plain_steps(model, opt, batches()*4)
    again,opt2,manager2 = managed(sgd, lambda: [GMPruningModifier(.05, .9, .5, 6., .25)], epochs=6)
    manager2.load_state_dict(manager.state_dict())
    again.load_state_dict(model.state_dict())
    plain_steps(again, opt2, batches()*2)
    manager2.finalize()
    assert abs(measured_sparsity(again)-.9)<.01

def test_load_refuses():
    model,opt,manager = managed(sgd, cases['gmp'])
    state = manager.state_dict()
    with pytest.raises(ValueError, match=r"\['GMPruningModifier'\], this manager has \['EpochRangeModifier'\]"): managed(sgd, cases['epochs'])[2].load_state_dict(state)
    with pytest.raises(ValueError, match='8 steps_per_epoch, this loop 4'): managed(sgd, cases['gmp'], steps=4)[2].load_state_dict(state)
    model(batches()[0][0])
    with pytest.raises(RuntimeError, match='begun already'): manager.load_state_dict(state)

# misuse

def test_errors_come_before_anything_changes():
    model,other = mlp(),mlp()
    opt = sgd(model.parameters())
    with pytest.raises(TypeError, match='model must be a module'): LoopManager(model.parameters(), opt, 8, 4)
    with pytest.raises(TypeError, match='GradScaler'): LoopManager(model, torch.amp.GradScaler('cpu'), 8, 4)
    with pytest.raises(TypeError, match='optimizer must be'): LoopManager(model, SGD(model.parameters(), .1), 8, 4)
    with pytest.raises(ValueError, match='none of the model'): LoopManager(other, opt, 8, 4)
    with pytest.raises(TypeError, match='steps_per_epoch must be a whole number, got 7.5'): LoopManager(model, opt, 7.5, 4)
    with pytest.raises(ValueError, match='epochs must be at least 1'): LoopManager(model, opt, 8, 0)
    with pytest.raises(TypeError, match='cbs must be callbacks'): LoopManager(model, opt, 8, 4, [nn.ReLU()])
    for cb in MixedPrecision(),GradientAccumulation(8):
        with pytest.raises(ValueError, match='a plain loop can.t raise'): LoopManager(model, opt, 8, 4, cb)
    with pytest.raises(ValueError, match='which has none|not found|no parameter|nope'): LoopManager(model, opt, 8, 4, GMPruningModifier(.05, .8, 0., 3., .5, ['nope']))
    assert 'step' not in vars(opt) and not model._forward_pre_hooks and not masked_params(model)
    LoopManager(model, opt, 8, 4)

def test_recipes():
    recipe = Recipe.from_modifiers(GMPruningModifier(.05, .8, 0., 3., .5), EpochRangeModifier(0., 4.))
    model,opt,manager = managed(sgd, recipe.callbacks, epochs=recipe.max_epochs)
    for _ in range(manager.max_epochs): plain_steps(model, opt, batches())
    manager.finalize()
    assert abs(measured_sparsity(model)-.8)<.01
    with pytest.raises(ValueError, match='needs 4 epochs'): managed(sgd, recipe.callbacks, epochs=3)
