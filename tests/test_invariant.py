"A masked weight is exactly 0 after every optimizer step and in every checkpoint, and so is all that the optimizer remembers of it"
import io,os,pickle,subprocess,sys,pytest,timm
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch.utils.checkpoint import checkpoint
from torch.optim.swa_utils import AveragedModel,get_ema_multi_avg_fn
from utils import *
from fastsparse_create.callback.dynamic import *
from fastsparse_create.criteria import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.selection import *
import copy,warnings

class Spread(torch.optim.Optimizer):
    "Like Muon: momentum, then a step in which every weight of a row depends on all others"
    def __init__(self, params, lr=.1, momentum=.9): super().__init__(params, dict(lr=lr, momentum=momentum))
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None: continue
                buffer = self.state[p].setdefault('buffer', torch.zeros_like(p))
                buffer.mul_(group['momentum']).add_(p.grad)
                p.sub_(buffer+buffer.sum(-1, keepdim=True), alpha=group['lr'])

def wrapped(opt, **kwargs): return partial(OptimWrapper, opt=partial(opt, **kwargs))

optimizers = dict(
    sgd=partial(SGD, mom=.9), sgd_l2=partial(SGD, mom=.9, decouple_wd=False), rmsprop=partial(RMSProp, mom=.9), adam=Adam,
    adam_l2=partial(Adam, decouple_wd=False), radam=RAdam, qhadam=QHAdam, larc=Larc, lamb=Lamb, ranger=ranger,
    lookahead=lambda p, lr: Lookahead(SGD(p, lr=lr, mom=.9), k=2),
    torch_sgd=wrapped(torch.optim.SGD, momentum=.9, nesterov=True), torch_adam=wrapped(torch.optim.Adam, amsgrad=True),
    torch_adamw=wrapped(torch.optim.AdamW), torch_rmsprop=wrapped(torch.optim.RMSprop, momentum=.9, centered=True),
    torch_nadam=wrapped(torch.optim.NAdam), torch_adadelta=wrapped(torch.optim.Adadelta), torch_adagrad=wrapped(torch.optim.Adagrad))
strange = dict(spread=wrapped(Spread), torch_rprop=wrapped(torch.optim.Rprop), torch_asgd=wrapped(torch.optim.ASGD))
every_optimizer = pytest.mark.parametrize('opt_func', [pytest.param(f, id=n) for n,f in optimizers.items()])

# the promise, step by step

@pytest.mark.parametrize('opt_func', [pytest.param(f, id=n) for n,f in {**optimizers,**strange}.items()])
@pytest.mark.parametrize('cbs', [[], [Stranger]], ids=['trusted','checked'])
def test_weights_and_memory_are_zero_after_every_step(opt_func, cbs):
    "Masks are cut in the middle of training, when the optimizer already has a memory of what goes"
    learn,witness = sparse_learner(.3, opt_func=opt_func, lr=.01, wd=.1 if opt_func in optimizers.values() else None),Witness()
    cut = GMPruningModifier(.3, .8, 1, 2, .25)
    learn.fit(3, cbs=[witness, cut, *(c() for c in cbs)])
    assert witness.steps==12 and witness.seen==[]
    assert n_masked(learn.model)==sum(round(p.param.numel()*.8) for p in masked_params(learn.model))
    assert all(memory(learn.opt, p.param) for p in masked_params(learn.model)) and all(p.param[p.mask].count_nonzero() for p in masked_params(learn.model))

class Reparametrized(nn.Module):
    "The same linear layer, in which plain PyTorch sees to it that masked weights neither act nor learn"
    def __init__(self, linear, mask):
        super().__init__()
        self.weight,self.bias,self.keep = nn.Parameter(linear.weight.detach().clone()),nn.Parameter(linear.bias.detach().clone()),(mask.float(),)
    def forward(self, x): return F.linear(x, self.weight*self.keep[0], self.bias)

def reparametrized(model): return nn.Sequential(*(Reparametrized(m, m.weight_mask) if hasattr(m, 'weight_mask') else copy.deepcopy(m) for m in model))

def both_runs(opt_func=partial(SGD, mom=.9), cbs=lambda: [], fit=lambda learn,cbs: learn.fit(3, cbs=cbs), change=noop, lr=.01, **kwargs):
    "Weights after training with masks, and after training without them a model that says `weight*mask` in its forward"
    learn = sparse_learner(.6, opt_func=opt_func, lr=lr, wd=.1, **kwargs)
    twin = tiny_learner(reparametrized(learn.model), opt_func=opt_func, lr=lr, wd=.1, **kwargs)
    for l in (learn,twin): fit(change(l) or l, cbs())
    return weights(learn.model),weights(twin.model),learn

@every_optimizer
def test_training_is_that_of_a_reparametrized_model(opt_func):
    a,b,_ = both_runs(opt_func)
    assert same(a, b)

@every_optimizer
def test_trusted_run_is_the_checked_run(opt_func):
    "Also for a layer that only every other batch uses, and which decay and momentum move in between"
    class Alternating(nn.Module):
        def __init__(self): super().__init__(); self.m,self.n = mlp(),0
        def forward(self, x):
            self.n += self.training
            return self.m[4](self.m[:2](x) if self.n%2 else self.m[:4](x))
    def _run(*cbs):
        learn = sparse_learner(.6, model=Alternating(), opt_func=opt_func, lr=.01, wd=.1)
        learn.fit(2, cbs=list(cbs))
        return weights(learn.model)
    assert same(_run(), _run(Stranger()))

@pytest.mark.parametrize('norm', [1e-3,.1])
def test_clip_norm_sees_masked_gradients(norm):
    a,b,_ = both_runs(cbs=lambda: [GradientClip(norm)])
    assert same(a, b)

@every_optimizer
def test_gradient_accumulation_masks_the_sum(opt_func):
    a,b,_ = both_runs(opt_func, cbs=lambda: [GradientAccumulation(16)])
    assert same(a, b)

def test_accumulated_leftovers_do_not_unmask():
    "fastai carries what was accumulated at the end of an epoch over to the next, and to the next fit"
    def _fits(learn, cbs):
        learn.fit(2, cbs=cbs)
        learn.fit(1)
    a,b,learn = both_runs(cbs=lambda: [GradientAccumulation(24)], fit=_fits)
    assert same(a, b) and violations(learn.model, learn.opt)==[]

def test_one_cycle_with_momentum_schedule():
    a,b,_ = both_runs(Adam, fit=lambda learn,cbs: learn.fit_one_cycle(3, 1e-2, cbs=cbs))
    assert same(a, b)

def test_half_precision():
    a,b,learn = both_runs(Adam, change=lambda l: l.to_fp16(), cbs=lambda: [GradientClip(.1)])
    assert same(a, b) and violations(learn.model, learn.opt)==[]

@trusted
class Overflow(Callback):
    "Like `MixedPrecision` that finds inf in some gradients: no step, but `after_step` follows"
    order,run_valid = 10,False
    def before_step(self):
        if self.iter%2==0:
            for p in self.model.parameters(): p.grad.fill_(math.inf)
            raise CancelStepException()

def test_skipped_steps_leave_no_trace():
    a,b,learn = both_runs(Adam, cbs=lambda: [Overflow()])
    assert same(a, b) and violations(learn.model, learn.opt)==[]
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_channels_last():
    def _learner(**kwargs): return sparse_learner(.6, model=convnet(), shape=(3,8,8), wd=.1, **kwargs)
    learn,witness = _learner(cbs=ChannelsLast()),Witness()
    learn.fit(2, cbs=[witness, GMPruningModifier(.6, .9, 1, 2, .5)])
    assert witness.seen==[] and learn.model[3].weight.is_contiguous(memory_format=torch.channels_last)

# the small dense network that a masked one stands for

def small_and_masked(dtype=torch.float64, dead=slice(10,16), **kwargs):
    "A network whose hidden units `dead` are masked on both sides, and one that never had them"
    big,alive = tiny_learner(mlp().to(dtype), dtype=dtype, **kwargs),slice(0,10)
    small = tiny_learner(mlp(d_hid=10).to(dtype), dtype=dtype, **kwargs)
    for p in attach_masks(big.model, ['0','2','4.weight','0.bias','2.bias']):
        mask = torch.ones_like(p.param, dtype=torch.bool)
        if p.name in ('2.weight','4.weight'): mask[:,dead] = False
        if p.name!='4.weight': mask[dead] = False
        set_mask(p, mask)
    MaskEnforcer.ensure(big)
    rows = {'0':(alive,slice(None)), '2':(alive,alive), '4':(slice(None),alive)}
    def _cut(model): return {n:p.detach()[rows[n[0]]] if p.ndim>1 else p.detach()[rows[n[0]][0]] for n,p in model.named_parameters()}
    small.model.load_state_dict(_cut(big.model))
    return big,small,_cut

@every_optimizer
def test_masked_run_is_the_small_dense_run(opt_func):
    big,small,cut = small_and_masked(opt_func=opt_func, lr=.01, wd=.1)
    for learn in (big,small): learn.fit(3, cbs=GradientClip(.5))
    for n,w in cut(big.model).items(): torch.testing.assert_close(w, dict(small.model.named_parameters())[n].detach(), rtol=1e-9, atol=1e-11)

def test_masked_run_is_the_small_dense_run_bit_for_bit():
    "With weights, inputs and rates of few binary digits every sum is exact, in whatever order a library adds"
    big,small,cut = small_and_masked(opt_func=partial(SGD, mom=.5), lr=2**-3, wd=0., n_trn=2)  # a third step would need 54 digits
    for learn in (big,small):
        for p in learn.model.parameters(): p.data.sign_().div_(2)
        for dl in learn.dls: dl.dataset = TensorDataset(*(t.round().clamp(-1,1) for t in dl.dataset.tensors))
        learn.fit(1)
    assert same(cut(big.model), weights(small.model)) and not same(weights(small.model), {n:p.round(decimals=1) for n,p in weights(small.model).items()})

# averages of weights

def ema_learner(make_ema, cbs):
    learn = sparse_learner(.5)
    ema = make_ema(learn.model)
    update = ema.update_parameters if isinstance(ema, AveragedModel) else ema.update
    learn.fit(3, cbs=[Note('after_step', lambda cb: update(cb.model)), *cbs])
    return learn,ema.module

emas = dict(swa=lambda m: AveragedModel(m), ema=lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(.9)),
            timm=lambda m: timm.utils.ModelEmaV3(m, decay=.9))
every_ema = pytest.mark.parametrize('make_ema', [pytest.param(f, id=n) for n,f in emas.items()])

@every_ema
def test_average_of_constant_masks_is_as_sparse(make_ema):
    learn,average = ema_learner(make_ema, [])
    assert all(p.mask.equal(q.mask) and p.mask.dtype==torch.bool for p,q in zip(masked_params(average), masked_params(learn.model)))
    assert violations(average)==[] and n_masked(average)==n_masked(learn.model)

@every_ema
def test_average_follows_masks_that_grow(make_ema):
    "What was cut still has a share in the average; the average's own hooks take it out when it is used or saved"
    learn,average = ema_learner(make_ema, [GMPruningModifier(.5, .9, 1, 2, .25)])
    assert all(p.mask.equal(q.mask) for p,q in zip(masked_params(average), masked_params(learn.model)))
    state = average.state_dict()
    assert all(state[f'{p.name}'][~p.mask].count_nonzero()==0 for p in masked_params(learn.model))
    assert measured_sparsity(average)==measured_sparsity(learn.model)

def test_copy_masks_what_it_holds_and_not_the_original():
    learn = sparse_learner(.5)
    twin = copy.deepcopy(learn.model)
    for p in masked_params(twin): set_mask(p, ~p.mask)
    for m in (learn.model,twin):
        for p in m.parameters(): p.data.fill_(1)
        m(torch.ones(1,4))
    assert violations(learn.model)==[] and violations(twin)==[]
    assert all(p.param.add(q.param).eq(1).all() for p,q in zip(masked_params(learn.model), masked_params(twin)))

# freezing, lr_find, fine_tune

def test_frozen_layers_keep_their_masks():
    learn,witness = sparse_learner(.6, splitter=halves),Witness()
    learn.freeze()
    before = weights(learn.model[:2])
    learn.fit(1, cbs=witness)
    assert same(before, weights(learn.model[:2])) and witness.seen==[]
    learn.unfreeze()
    learn.fit(1, cbs=witness)
    assert not same(before, weights(learn.model[:2])) and witness.seen==[]

def test_frozen_layers_are_pruned_too():
    learn = tiny_learner(splitter=halves)
    learn.freeze()
    learn.fit(2, cbs=GMPruningModifier(0., .5, 0, 2, 1))
    assert measured_sparsity(learn.model)==.5 and violations(learn.model, learn.opt)==[]

@pytest.mark.parametrize('pruner', [False,True])
def test_lr_find_restores_exactly(pruner, tmp_path):
    "A fit after `lr_find` is the fit that there would have been without it, from the second batch of parameters to the last bit"
    def _run(finds):
        learn = sparse_learner(.6, path=tmp_path)
        if pruner: learn.add_cb(GMPruningModifier(.6, .9, 0, 2, .5))
        learn.fit(1)
        before,masks,memories = weights(learn.model),[p.mask.clone() for p in masked_params(learn.model)],[m.clone() for p in learn.model.parameters() for m in memory(learn.opt, p)]
        if finds:
            learn.lr_find(show_plot=False, num_it=10)
            assert same(before, weights(learn.model)) and all(p.mask.equal(m) for p,m in zip(masked_params(learn.model), masks))
            assert all(a.equal(b) for a,b in zip(memories, [m for p in learn.model.parameters() for m in memory(learn.opt, p)]))
        learn.fit(1)
        return weights(learn.model)
    assert same(_run(True), _run(False))

def test_lr_find_does_not_prune():
    learn = tiny_learner(cbs=GMPruningModifier(.5, .9, 0, 1, .25))
    witness = Note('after_step', lambda cb: measured_sparsity(cb.model, '__ALL_PRUNABLE__'))
    with learn.added_cbs(witness): learn.lr_find(show_plot=False, num_it=8)
    assert len(witness.notes)>3 and set(witness.notes)=={0.}

def test_masks_hold_during_lr_find():
    learn,witness = sparse_learner(.6),Witness()
    with learn.added_cbs(witness): learn.lr_find(show_plot=False, num_it=8, end_lr=.1)
    assert witness.steps>3 and witness.seen==[]

def test_fine_tune_continues_the_schedule():
    learn = tiny_learner(splitter=halves)
    sparsities = Note('after_batch', lambda cb: measured_sparsity(cb.model))
    learn.fine_tune(2, cbs=[GMPruningModifier(0., .75, 0, 3, .25, inter_func='linear'), sparsities])
    assert sparsities.notes==sorted(sparsities.notes) and len(set(sparsities.notes))==12
    assert measured_sparsity(learn.model)==.75

# checkpoints

def test_every_checkpoint_is_sparse_and_loads_into_a_fresh_model(tmp_path):
    learn = tiny_learner(path=tmp_path)
    learn.fit(4, cbs=[GMPruningModifier(0., .8, 0, 4, 1, inter_func='linear'), SaveModelCallback(every_epoch=True)])
    for epoch,expected in enumerate([0.,.2,.4,.8]):
        fresh = mlp()
        masks_from_file(fresh, tmp_path/f'models/model_{epoch}.pth')
        assert violations(fresh)==[] and measured_sparsity(fresh)==n_masked(fresh)/352==pytest.approx(expected, abs=3e-3)

def test_best_epoch_comes_back_with_its_masks(tmp_path):
    "The best epoch is the first, of less sparsity than the last"
    learn = tiny_learner(path=tmp_path)
    loss = Note('after_epoch', lambda cb: None)
    learn.fit(3, cbs=[GMPruningModifier(.25, .75, 0, 3, 1, inter_func='linear'), SaveModelCallback(monitor='sparsity', comp=np.less)])
    assert measured_sparsity(learn.model)==.25==n_masked(learn.model)/352
    witness = Witness()
    learn.fit(1, cbs=witness)
    assert witness.seen==[] and measured_sparsity(learn.model)==.25

def test_early_stopping_in_mid_schedule_and_on():
    learn,gmp = tiny_learner(lr=0.),GMPruningModifier(0., .8, 0, 4, .5, inter_func='linear')
    learn.fit(4, cbs=[gmp, EarlyStoppingCallback(monitor='sparsity', comp=np.less, patience=1)])
    stopped = measured_sparsity(learn.model)
    assert 0<stopped<.8
    learn.fit(1)
    assert measured_sparsity(learn.model)==stopped
    learn.fit(3, cbs=gmp)
    assert measured_sparsity(learn.model)==pytest.approx(.8, abs=2e-3)

@pytest.mark.parametrize('opt_func', [optimizers[n] for n in ('sgd','adam','ranger','torch_adamw')])
def test_load_brings_masks_of_its_time(opt_func, tmp_path):
    learn = sparse_learner(.4, path=tmp_path, opt_func=opt_func)
    learn.fit(1)
    learn.save('then')
    before,n = weights(learn.model),n_masked(learn.model)
    learn.fit(1, cbs=GMPruningModifier(.4, .9, 0, 1, .5))
    learn.load('then')
    assert same(before, weights(learn.model)) and n_masked(learn.model)==n
    witness = Witness()
    learn.fit(1, cbs=witness)
    assert witness.seen==[] and n_masked(learn.model)==n

@pytest.mark.parametrize('opt_func', [optimizers[n] for n in ('sgd','adam','lookahead','torch_adamw')], ids=['sgd','adam','lookahead','torch_adamw'])
def test_resumed_in_a_fresh_learner_is_uninterrupted(opt_func, tmp_path):
    "Masks come from the file, momentum too, and a schedule that is half done goes on"
    def _gmp(): return GMPruningModifier(0., .8, 0, 4, .5)
    def _learner(): return tiny_learner(path=tmp_path, opt_func=opt_func)
    whole = _learner()
    whole.fit(4, cbs=[_gmp(), SaveModelCallback(every_epoch=True, with_opt=True, fname='epoch')])
    resumed = _learner()
    masks_from_file(resumed.model, tmp_path/'models/epoch_1.pth')
    resumed.load('epoch_1')
    resumed.fit(4, cbs=_gmp(), start_epoch=2)
    assert same(weights(whole.model), weights(resumed.model)) and measured_sparsity(resumed.model)==pytest.approx(.8, abs=2e-3)

def test_two_fits_are_one(tmp_path):
    "The same modifier over fits of 1, 1 and 2 epochs gives the weights of one fit over 4, to the last bit"
    def _run(*epochs):
        learn,gmp = tiny_learner(),GMPruningModifier(.05, .8, .5, 3.5, .25)
        for n in epochs: learn.fit(n, cbs=gmp)
        return weights(learn.model)
    assert same(_run(4), _run(1,1,2)) and same(_run(4), _run(3,1))

def test_file_without_masks_is_read_by_its_zeros(tmp_path):
    learn = sparse_learner(.7)
    torch.save(make_permanent(copy.deepcopy(learn.model)).state_dict(), tmp_path/'plain.pth')
    fresh = mlp()
    masks_from_file(fresh, tmp_path/'plain.pth')
    assert all(p.mask.equal(q.mask) for p,q in zip(masked_params(fresh), masked_params(learn.model))) and violations(fresh)==[]

def test_file_is_read_into_wrapped_model(tmp_path):
    learn = sparse_learner(.7, path=tmp_path)
    learn.save('m')
    fresh = nn.DataParallel(mlp())
    masks_from_file(fresh, tmp_path/'models/m.pth')
    assert same(weights(fresh.module), weights(learn.model)) and n_masked(fresh)==n_masked(learn.model)

def test_masks_of_the_model_itself_are_no_pruning_masks(tmp_path):
    "Transformers keep boolean buffers like `causal_mask`"
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4,4)
            self.register_buffer('causal_mask', torch.ones(4,4).tril().bool())
    model = Causal()
    sparsify_model(model, .5)
    torch.save(model.state_dict(), tmp_path/'m.pth')
    fresh = Causal()
    assert [p.name for p in masks_from_file(fresh, tmp_path/'m.pth')]==['linear.weight'] and measured_sparsity(fresh)==.5

def test_unfit_file_changes_nothing(tmp_path):
    other = mlp(d_hid=8)
    sparsify_model(other, .5)
    torch.save(other.state_dict(), tmp_path/'other.pth')
    model = mlp()
    before = model.state_dict().keys()
    with pytest.raises((RuntimeError,ValueError)): masks_from_file(model, tmp_path/'other.pth')
    assert model.state_dict().keys()==before
    with pytest.raises(FileNotFoundError, match='nowhere'): masks_from_file(model, tmp_path/'nowhere.pth')

def test_state_dict_is_clean_whatever_was_written():
    learn = sparse_learner(.6)
    for p in learn.model.parameters(): p.data.fill_(1)
    state = learn.model.state_dict()
    assert all(state[p.name][~p.mask].count_nonzero()==0 for p in masked_params(learn.model))

def test_masks_cost_a_byte_a_weight():
    learn = tiny_learner()
    def _bytes(): return sum(t.numel()*t.element_size() for t in learn.model.state_dict().values())
    before = _bytes()
    sparsify_model(learn, .9)
    learn.fit(1)
    assert _bytes()-before==352

def test_exported_learner_is_sparse_and_trains_on(tmp_path):
    learn,dls = sparse_learner(.6, path=tmp_path),tiny_dls()
    learn.fit(1, cbs=GMPruningModifier(.6, .8, 0, 1, .5))
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    assert same(weights(loaded.model), weights(learn.model)) and loaded.model(torch.ones(1,4)).equal(learn.model(torch.ones(1,4)))
    loaded.dls,witness = dls,Witness()
    loaded.fit(1, cbs=witness)
    assert witness.seen==[] and witness.steps==4 and n_masked(loaded.model)==n_masked(learn.model)
    for p in loaded.model.parameters(): p.data.fill_(1)
    loaded.model(torch.ones(1,4))
    assert violations(loaded.model)==[]

def test_attached_modifier_survives_export(tmp_path):
    learn = tiny_learner(path=tmp_path, cbs=GMPruningModifier(0., .8, 0, 2, .5))
    learn.fit(1)
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    loaded.dls = tiny_dls()
    for l in (learn,loaded): l.fit(1)
    assert measured_sparsity(loaded.model)==measured_sparsity(learn.model)==pytest.approx(.8, abs=2e-3)

@pytest.mark.parametrize('copy_', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _through_file(m)], ids=['deepcopy','pickle','torch.save'])
def test_copies_carry_masks_and_hooks(copy_):
    "Also of a model that has been trained, and whose parameters have hooks and gradients"
    learn = sparse_learner(.6)
    learn.fit(1)
    learn.model(torch.ones(1,4)).sum().backward()
    twin = copy_(learn.model)
    assert n_masked(twin)==n_masked(learn.model)
    plain_steps(twin, torch.optim.Adam(twin.parameters(), weight_decay=.1))

def _through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)

# interruptions

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch'])
def test_fit_after_interrupt_goes_on(event):
    learn,gmp = tiny_learner(),GMPruningModifier(0., .8, 0, 3, .25, inter_func='linear')
    until_interrupted(learn.fit, 3, cbs=[gmp, Interrupt(event, 2, 1)])
    held = n_masked(learn.model)
    assert violations(learn.model, learn.opt)==[] and 0<held<.8*352
    learn.opt.zero_grad()
    plain_steps(learn.model, torch.optim.SGD(learn.model.parameters(), .01, momentum=.9))
    witness = Witness()
    learn.fit(1, cbs=witness)
    assert witness.seen==[] and n_masked(learn.model)==held
    learn.fit(3, cbs=gmp)
    assert measured_sparsity(learn.model)==pytest.approx(.8, abs=2e-3)

@pytest.mark.parametrize('error', [RuntimeError,KeyboardInterrupt])
def test_error_inside_of_backward(error):
    "Like running out of memory: `after_backward` never comes, and a plain loop must not suffer from that"
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise error('out of memory')
    learn = sparse_learner(.6)
    hook = learn.model[1].register_forward_hook(lambda m,x,out: Fail.apply(out))
    with pytest.raises((RuntimeError,KeyboardInterrupt)): learn.fit(1)
    hook.remove()
    learn.opt.zero_grad()
    for p in learn.model.parameters(): p.grad = None
    plain_steps(learn.model, torch.optim.Adam(learn.model.parameters(), weight_decay=.1))
    witness = Witness()
    learn.fit(1, cbs=witness)
    assert witness.seen==[] and witness.steps==4

def test_metrics_survive_an_interrupt():
    learn = sparse_learner(.6, metrics=mse)
    until_interrupted(learn.fit, 1, cbs=Interrupt('after_pred'))
    learn.fit(1)
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','mse','sparsity','time'] and [m.name for m in learn.metrics]==['mse']

def test_interrupted_forward_vouches_for_nothing():
    "Ctrl-C in the first layer: the second must still look at its weights next time"
    learn = sparse_learner(.6)
    def _interrupt(*_): raise KeyboardInterrupt
    hook = learn.model[1].register_forward_hook(_interrupt)
    until_interrupted(learn.fit, 1)
    hook.remove()
    for p in learn.model.parameters(): p.data.fill_(1)
    learn.model(torch.ones(1,4))
    assert violations(learn.model)==[]

def test_skipped_layer_is_vouched_for_once():
    "A layer that training leaves out (layer drop) must look at its weights when it is next used"
    class Optional(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.uses_b = mlp(),nn.Linear(2,2),False
        def forward(self, x): return self.b(self.a(x)) if self.uses_b else self.a(x)
    learn = sparse_learner(.5, model=Optional())
    learn.fit(1)
    learn.model.b.weight.data.fill_(1)
    learn.model.uses_b = True
    learn.model(torch.ones(1,4))
    assert violations(learn.model)==[]

@trusted
class Stop(Callback):
    def before_batch(self): raise KeyboardInterrupt

def interrupt(learn, rehearsal):
    with learn.added_cbs(Stop()): until_interrupted(partial(learn.lr_find, show_plot=False) if rehearsal=='lr_find' else learn.get_preds)

rehearsals = pytest.mark.parametrize('rehearsal', ['lr_find','get_preds'])

@rehearsals
def test_fit_after_interrupted_rehearsal_prunes(rehearsal):
    learn = tiny_learner(cbs=GMPruningModifier(.5, .5, 0, 1, 1))
    interrupt(learn, rehearsal)
    learn.fit(1)
    assert measured_sparsity(learn.model)==.5

@rehearsals
def test_fit_after_interrupted_rehearsal_exchanges(rehearsal):
    learn,dst = dynamic_learner(RigL_kwargs)
    learn.add_cb(dst)
    before = [p.mask.clone() for p in masked_params(learn.model)]
    interrupt(learn, rehearsal)
    learn.fit(2)
    assert not any(p.mask.equal(m) for p,m in zip(masked_params(learn.model), before))

# looking is free

def look(learn, how):
    if how=='validate': learn.validate()
    if how=='get_preds': learn.get_preds()
    if how=='with_loss': learn.get_preds(dl=learn.dls.train, with_loss=True, with_decoded=True)
    if how=='summary': learn.summary()

@pytest.mark.parametrize('how', ['validate','get_preds','with_loss','summary'])
def test_looking_prunes_nothing_prints_nothing_and_moves_no_clock(how, capsys, caplog):
    gmp = GMPruningModifier(.5, .9, 0, 2, .25)
    learn = tiny_learner(cbs=gmp)
    before = weights(learn.model)
    look(learn, how)
    assert same(before, weights(learn.model))
    learn.fit(1)
    state,n = weights(learn.model),n_masked(learn.model)
    capsys.readouterr(); caplog.clear()
    for _ in range(2): look(learn, how)
    assert capsys.readouterr().out=='' and caplog.text==''
    assert same(state, weights(learn.model)) and n_masked(learn.model)==n
    learn.fit(1)
    once,gmp = tiny_learner(),GMPruningModifier(.5, .9, 0, 2, .25)
    for _ in range(2): once.fit(1, cbs=gmp)
    assert same(weights(learn.model), weights(once.model))

def test_validation_sees_the_sparse_model():
    learn = sparse_learner(.6, cbs=Stranger())
    for p in learn.model.parameters(): p.data.fill_(1)
    learn.validate()
    assert violations(learn.model)==[]

def test_masks_outlive_the_fit_that_made_them():
    learn = tiny_learner()
    learn.fit(1, cbs=GMPruningModifier(.9, .9, 0, 1, 1))
    n = n_masked(learn.model)
    learn.fit(2)
    learn.fit_one_cycle(1)
    assert measured_sparsity(learn.model)==n/352 and n>300

def test_nothing_is_printed_and_the_reported_sparsity_is_measured(capsys):
    learn = tiny_learner()
    learn.fit(2, cbs=GMPruningModifier(0., .8, 0, 2, .1))
    assert capsys.readouterr().out==''
    assert learn.recorder.values[-1][-1]==measured_sparsity(learn.model)==pytest.approx(.8, abs=2e-3)

@pytest.mark.slow
def test_importing_leaves_the_random_state_alone():
    state = 'torch.get_rng_state().tolist(),str(numpy.random.get_state()),random.getstate()'
    code = f'import torch,random,numpy,fastai.callback.all; a={state}; import fastsparse_create.all; assert a==({state})'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, cwd=Path(__file__).parent.parent)

def test_sparsity_of_each_batch_is_recorded():
    learn = tiny_learner()
    learn.fit(2, cbs=GMPruningModifier(.25, .75, .5, 1, .5))
    assert learn.recorder.sparsities==[0.]*2+[.25]*2+[.75]*4

def test_masking_uses_no_global_randomness():
    def _state_after(sparse):
        learn = tiny_learner()
        torch.manual_seed(0)
        if sparse: sparsify_model(learn, .5, reinit=True, criterion=random_scores)
        learn.fit(1, cbs=[GMPruningModifier(.6, .9, 0, 1, .25, params=['0.weight']), SET(every=1, params=['re:[1-9]'])] if sparse else [])
        return torch.get_rng_state()
    assert _state_after(True).equal(_state_after(False))

# models and loops without callbacks

def plain_steps(model, opt, x=None, steps=3, forward=None):
    "Train in a plain loop; nobody tells the optimizer about masks"
    x = torch.randn(8,4) if x is None else x
    for _ in range(steps):
        out = (forward or model)(x)
        out = out[0] if isinstance(out, tuple) else out
        (out-1).square().mean().backward()
        opt.step()
        opt.zero_grad()
        assert violations(model, opt)==[]
    assert any(memory(opt, p.param) for p in masked_params(model))

torch_optimizers = dict(sgd=partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=.1), adam=partial(torch.optim.Adam, weight_decay=.1, amsgrad=True),
                        adamw=torch.optim.AdamW, rmsprop=partial(torch.optim.RMSprop, momentum=.9), foreach=partial(torch.optim.AdamW, foreach=True))

@pytest.mark.parametrize('opt', [pytest.param(f, id=n) for n,f in torch_optimizers.items()])
def test_plain_loop(opt):
    model = mlp()
    sparsify_model(model, .6)
    twin = reparametrized(model)
    opts = [opt(m.parameters()) for m in (model,twin)]
    x = torch.randn(8,4)
    plain_steps(model, opts[0], x)
    plain_steps_twin(twin, opts[1], x)
    assert same(weights(model), weights(twin))

def plain_steps_twin(model, opt, x):
    for _ in range(3):
        (model(x)-1).square().mean().backward()
        opt.step()
        opt.zero_grad()

def test_plain_loop_with_dense_optimizer_forwards_and_saves_zeros():
    "Its step moves masked weights; neither the next forward pass nor a checkpoint sees that"
    model = mlp()
    sparsify_model(model, .6)
    opt,seen = Spread(model.parameters()),[]
    for m in model: m.register_forward_hook(lambda *_: seen.extend(violations(model[0])))
    for _ in range(3):
        model(torch.randn(8,4)).square().mean().backward()
        opt.step()
        state = copy.deepcopy(model).state_dict()
        assert all(state[p.name][~p.mask].count_nonzero()==0 for p in masked_params(model))
        model(torch.randn(8,4))
        assert violations(model, opt)==[]
    assert seen==[]

def test_several_forward_passes_before_one_backward():
    "Siamese and contrastive losses, layers that are used twice"
    model = mlp()
    sparsify_model(model, .6)
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    plain_steps(model, opt, forward=lambda x: model(x)-model(x.flip(0)))
    plain_steps(model, opt, forward=lambda x: model[4](model[2](model[2](model[0](x)))))

def test_saving_between_forward_and_backward():
    model = mlp()
    sparsify_model(model, .6)
    loss = model(torch.randn(8,4)).square().mean()
    model.state_dict()
    loss.backward()
    assert all(p.param.grad[~p.mask].count_nonzero()==0 for p in masked_params(model))

def test_layer_that_a_learner_uses_twice():
    class Shared(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(4,8),nn.Linear(8,8),nn.Linear(8,2)
        def forward(self, x): return self.c(self.b(self.b(self.a(x)).relu()).relu())
    for cbs in ([],[Stranger()]):
        learn,witness = sparse_learner(.6, model=Shared()),Witness()
        learn.fit(1, cbs=[witness,*cbs])
        assert witness.seen==[]

def test_backward_twice_through_one_graph():
    model = mlp()
    sparsify_model(model, .6)
    loss = model(torch.randn(8,4)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(p.param.grad[~p.mask].count_nonzero()==0 for p in masked_params(model))

@pytest.mark.parametrize('use_reentrant', [True,False])
def test_recomputed_layers(use_reentrant):
    "Gradient checkpointing runs forward passes inside of backward"
    model = mlp()
    sparsify_model(model, .6)
    forward = lambda x: model[4](checkpoint(model[:4], x.requires_grad_(), use_reentrant=use_reentrant))
    plain_steps(model, torch.optim.SGD(model.parameters(), .1, momentum=.9), forward=forward)
    class Wrapped(nn.Module):
        def __init__(self): super().__init__(); self.m = model
        def forward(self, x): return forward(x)
    learn,witness = tiny_learner(Wrapped()),Witness()
    MaskEnforcer.ensure(learn)
    learn.fit(1, cbs=[witness, GMPruningModifier(.6, .8, 0, 1, .5)])
    assert witness.seen==[]

def test_compiled_model_in_a_plain_loop():
    model = mlp()
    sparsify_model(model, .6)
    plain_steps(model, torch.optim.SGD(model.parameters(), .1, momentum=.9), forward=torch.compile(model, backend='eager'))

def test_compiled_model_in_a_learner():
    learn,witness = sparse_learner(.6),Witness()
    learn.model = torch.compile(learn.model, backend='eager')
    learn.fit(2, cbs=[witness, GMPruningModifier(.6, .8, 0, 2, .5)])
    assert witness.seen==[] and witness.steps==8 and measured_sparsity(learn.model)==pytest.approx(.8, abs=2e-3)

@pytest.mark.parametrize('trace', [torch.jit.trace, lambda m,args: torch.export.export(m, args, strict=False).module()], ids=['jit','export'])
def test_masked_model_can_be_traced(trace):
    model = mlp().eval()
    sparsify_model(model, .6)
    assert trace(model, (torch.ones(1,4),))(torch.ones(1,4)).equal(model(torch.ones(1,4)))

def test_inference_mode_leaves_training_alone():
    model = mlp()
    sparsify_model(model, .6)
    with torch.inference_mode(): model(torch.randn(2,4))
    plain_steps(model, torch.optim.SGD(model.parameters(), .1, momentum=.9))

@pytest.mark.parametrize('value', [math.inf,math.nan])
def test_not_even_nan_gets_through(value):
    model = mlp()
    sparsify_model(model, .6)
    for p in masked_params(model): p.param.data[~p.mask] = value
    assert model(torch.ones(1,4)).isfinite().all() and violations(model)==[]

def test_new_masks_hold_from_the_next_pass_on():
    model = mlp()
    sparsify_model(model, .3)
    opt = torch.optim.Adam(model.parameters(), weight_decay=.1)
    for sparsity in (.3,.6,.5):
        sparsify_model(model, sparsity)
        mask_optimizer(opt, masked_params(model))
        plain_steps(model, opt)
        assert measured_sparsity(model)==pytest.approx(sparsity, abs=2e-3)

def test_move_to_another_dtype_keeps_masks():
    model = mlp()
    sparsify_model(model, .6)
    for dtype in (torch.float64,torch.bfloat16,torch.float32):
        model.to(dtype)
        assert {p.mask.dtype for p in masked_params(model)}=={torch.bool}
        plain_steps(model, torch.optim.SGD(model.parameters(), .1, momentum=.9), torch.randn(8,4).to(dtype))

# kinds of models

class Rolled(nn.Module):
    def __init__(self): super().__init__(); self.cell,self.head = nn.LSTMCell(4,8),nn.Linear(8,2)
    def forward(self, x):
        h = None
        for _ in range(3): h = self.cell(x, h)
        return self.head(h[0])

class Tied(nn.Module):
    "Two layers with one weight, as in language models"
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4,4),nn.Linear(4,4); self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x).relu())

class Parent(nn.Module):
    "Uses the weight of its child without calling the child, as timm's BEiT does"
    def __init__(self): super().__init__(); self.qkv = nn.Linear(4,2)
    def forward(self, x): return F.linear(x, self.qkv.weight, self.qkv.bias)

class Attention(nn.Module):
    def __init__(self, **kwargs): super().__init__(); self.mha = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)
    def forward(self, x): return self.mha(x[:,None], x[:,None], x[:,None])[0][:,0]

class Bare(nn.Module):
    "Has a weight of its own"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(2,4))
    def forward(self, x): return x@self.w.T

class Recurrent(nn.Module):
    def __init__(self, rnn): super().__init__(); self.rnn,self.head = rnn,nn.Linear(8,2)
    def forward(self, x): return self.head(self.rnn(x[:,None])[0][:,0])

def awd():
    from fastai.text.models.awdlstm import WeightDropout
    return Recurrent(WeightDropout(nn.LSTM(4, 8, batch_first=True), .2, 'weight_hh_l0'))

class Doubled(nn.Module):
    def forward(self, w): return 2*w

def parametrized():
    model = nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,2))
    for m in (model[0],model[2]): nn.utils.parametrize.register_parametrization(m, 'weight', Doubled())
    return model

models = dict(lstm=lambda: Recurrent(nn.LSTM(4, 8, 2, bidirectional=False, batch_first=True)), gru=lambda: Recurrent(nn.GRU(4, 8, batch_first=True)), awd=awd, rolled=Rolled,
              attention=Attention, attention_own_dims=lambda: Attention(kdim=4, vdim=4), encoder=lambda: nn.Sequential(nn.Unflatten(1, (1,4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(4,2)),
              tied=Tied, parent=Parent, bare=Bare, parametrized=parametrized, no_bias=lambda: nn.Sequential(nn.Linear(4,8,bias=False), nn.Linear(8,2,bias=False)),
              conv=lambda: nn.Sequential(nn.Unflatten(1, (1,4)), nn.Conv1d(1,8,3,padding=1,groups=1), nn.ConvTranspose1d(8,2,3), nn.AdaptiveAvgPool1d(1), nn.Flatten()))
model_params = dict(bare='w', parametrized=['re:.*weight.original'])
every_model = pytest.mark.parametrize('name', list(models))

def _model(name):
    torch.manual_seed(0)
    return models[name]()

@every_model
def test_every_kind_of_model_in_a_plain_loop(name):
    model = _model(name)
    sparsify_model(model, .5, model_params.get(name, '__ALL_PRUNABLE__'))
    assert n_masked(model)>0
    plain_steps(model, torch.optim.Adam(model.parameters(), weight_decay=.1))

@every_model
def test_every_kind_of_model_in_a_learner(name):
    d_out = 4 if name in ('tied','attention','attention_own_dims') else 2
    for cbs in ([],[Stranger()]):
        learn,witness = sparse_learner(.5, model_params.get(name, '__ALL_PRUNABLE__'), model=_model(name), d_out=d_out, opt_func=Adam),Witness()
        learn.fit(2, cbs=[witness, GMPruningModifier(.5, .75, 0, 2, .5, model_params.get(name, '__ALL_PRUNABLE__')), *cbs])
        assert witness.seen==[] and witness.steps==8

@every_model
def test_every_kind_of_model_forwards_zeros(name):
    model = _model(name).eval()
    sparsify_model(model, .5, model_params.get(name, '__ALL_PRUNABLE__'))
    with torch.no_grad():
        clean = model(torch.ones(1,4))
        for p in masked_params(model): p.param[~p.mask] = 1
        assert model(torch.ones(1,4)).equal(clean)

@every_model
def test_permanent_model_is_ordinary(name):
    model,plain = _model(name),_model(name)
    attributes = {n:set(m.__dict__) for n,m in plain.named_modules()}
    learn = sparse_learner(.5, model_params.get(name, '__ALL_PRUNABLE__'), model=model, d_out=4 if name in ('tied','attention','attention_own_dims') else 2)
    learn.fit(1)
    before = weights(model)
    make_permanent(model)
    assert model.state_dict().keys()==plain.state_dict().keys() and same(before, weights(model)) and masked_params(model)==[]
    assert {n:set(m.__dict__) for n,m in model.named_modules()}==attributes
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in model.modules())

def test_tied_weights_share_one_mask():
    model = Tied()
    sparsify_model(model, .5)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(masked_params(twin))==1 and twin.a.weight is twin.b.weight and twin.a.weight_mask.equal(twin.b.weight_mask)
        set_mask(masked_params(twin)[0], ~masked_params(twin)[0].mask)
        assert twin.a.weight_mask.equal(twin.b.weight_mask)
        plain_steps(twin, torch.optim.Adam(twin.parameters()))

def test_default_covers_linear_layers_and_names_what_it_cannot_find():
    learn = tiny_learner()
    learn.fit(1, cbs=GMPruningModifier(.9, .9, 0, 1, 1))
    assert [p.name for p in masked_params(learn.model)]==['0.weight','2.weight','4.weight']
    with pytest.raises(ValueError, match='3.weight'): sparsify_model(mlp(), .5, ['3.weight'])

def test_wrapped_models_are_named_like_their_inside():
    model = nn.DataParallel(mlp())
    sparsify_model(model, .6, ['2.weight','module.4'])
    assert [p.name for p in masked_params(model)]==[p.name for p in masked_params(model.module)]==['2.weight','4.weight']
    plain_steps(model, torch.optim.SGD(model.parameters(), .1, momentum=.9))
    learn,witness = tiny_learner(nn.DataParallel(mlp())),Witness()
    learn.fit(1, cbs=[witness, GMPruningModifier(.5, .8, 0, 1, .5)])
    assert witness.seen==[] and witness.steps==4 and n_masked(learn.model)>0

def test_masks_are_in_a_fixed_order():
    names = [[p.name for p in attach_masks(mlp(), {'4.weight','0.weight','2.weight'})] for _ in range(3)]
    assert names==[['0.weight','2.weight','4.weight']]*3

# strangers

@trusted
class Vandal(Callback):
    "Writes to all weights"
    def __init__(self, event, order=0):
        self.order = order
        setattr(self, event, lambda: [p.data.add_(.01) for p in self.model.parameters()])

@pytest.mark.parametrize('event', ['before_batch','after_step','after_batch','before_train','after_epoch'])
def test_written_weights_do_no_harm(event):
    "No forward pass, no validation and no checkpoint sees what an unknown callback writes"
    learn = sparse_learner(.6, cbs=Stranger())
    n,seen = n_masked(learn.model),Note('after_pred', lambda cb: violations(cb.model))
    seen.run_valid = True
    learn.fit(2, cbs=[Vandal(event), seen])
    assert sum(seen.notes, [])==[] and len(seen.notes)==10
    learn.model.state_dict()
    assert violations(learn.model)==[] and n_masked(learn.model)==n and measured_sparsity(learn.model)==n/352

@pytest.mark.parametrize('opt_func', [Adam,ranger])
def test_what_was_done_between_fits_does_no_harm(opt_func):
    "Written weights, and masks that changed without a word to the optimizer"
    learn,witness = sparse_learner(.4, opt_func=opt_func),Witness()
    learn.fit(2)
    for p in masked_params(learn.model): set_mask(p, torch.rand_like(p.param)>.5)
    for p in learn.model.parameters(): p.data.add_(1)
    seen = Note('after_pred', lambda cb: violations(cb.model))
    learn.fit(1, cbs=[witness,seen])
    assert witness.seen==[] and sum(seen.notes, [])==[] and len(seen.notes)==4

def test_callback_of_functions_is_not_trusted():
    "fastai's own `Callback` takes functions of the user"
    learn = sparse_learner(.6)
    seen = Note('after_pred', lambda cb: violations(cb.model))
    learn.fit(1, cbs=[Callback(after_batch=lambda self: [p.data.add_(1) for p in self.model.parameters()]), seen])
    assert sum(seen.notes, [])==[]

def test_parameters_that_the_optimizer_does_not_hold_are_checked():
    model = mlp()
    learn = sparse_learner(.6, model=model, splitter=lambda m: L([params(m[2:])]))
    witness,other = Witness(),torch.optim.SGD(model[0].parameters(), .1, momentum=.9)
    learn.fit(1, cbs=[witness, Note('after_step', lambda cb: [other.state.setdefault(model[0].weight, {}), model[0].weight.data.add_(1)], order=0)])
    assert witness.seen==[]

@pytest.mark.parametrize('opt_func', [pytest.param(f, id=n) for n,f in strange.items()])
def test_unknown_optimizer_is_checked(opt_func):
    learn,witness = sparse_learner(.6, opt_func=opt_func),Witness()
    learn.fit(2, cbs=witness)
    assert witness.seen==[] and witness.steps==8

def test_removed_enforcer_leaves_the_model_to_itself():
    learn,witness = sparse_learner(.6, opt_func=Adam, wd=.1),Witness()
    learn.remove_cb(MaskEnforcer)
    learn.fit(2, cbs=witness)
    assert witness.seen==[] and witness.steps==8

# attaching and letting go

def test_sparsifying_twice_hooks_once():
    learn = tiny_learner()
    for s in (.3,.6,.6): sparsify_model(learn, s)
    assert all(len(m._forward_pre_hooks)<=1 and len(m._state_dict_pre_hooks)<=1 for m in learn.model.modules())
    assert sum(isinstance(cb, MaskEnforcer) for cb in learn.cbs)==1
    learn.fit(1)
    learn.fit(1, cbs=GMPruningModifier(.6, .8, 0, 1, .5))
    assert sum(isinstance(cb, MaskEnforcer) for cb in learn.cbs)==1 and len(learn.model[0]._forward_pre_hooks)==1

def test_removed_hooks_leave_exact_zeros_behind():
    "Also without a validation pass at the end, which would have masked the weights"
    learn = tiny_learner()
    hooks = sparsify_model(learn, .6)
    with learn.no_logging(): learn.fit(1, cbs=Callback(before_validate=lambda self: (_ for _ in ()).throw(CancelValidException)))
    for h in hooks: h.remove()
    assert measured_sparsity(learn.model)==n_masked(learn.model)/352>.5
    learn.fit(1)
    assert measured_sparsity(learn.model)<.2  # what gets no gradient through its ReLU stays

@pytest.mark.parametrize('name', ['lstm','attention','attention_own_dims','rolled'])
@pytest.mark.parametrize('which', [0,1])
def test_removed_hook_frees_its_weight_and_no_other(name, which):
    "Recurrent and attention layers have several weights in one module"
    model = _model(name)
    hooks,x = sparsify_model(model, .5),torch.randn(8,4)
    freed,other = hooks[which].param,hooks[1-which].param
    hooks[which].remove()
    with torch.no_grad():
        for p in (freed,other): p.param.fill_(.1)
        model(x)
    assert freed.param.count_nonzero()==freed.param.numel() and other.param[~other.mask].count_nonzero()==0
    learn = tiny_learner(model, d_out=4 if 'attention' in name else 2)
    MaskEnforcer.ensure(learn)
    learn.fit(1)
    assert freed.param.count_nonzero()==freed.param.numel() and other.param[~other.mask].count_nonzero()==0

def test_mask_that_is_set_between_backward_and_step():
    model = mlp()
    sparsify_model(model, .3)
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    model(torch.randn(8,4)).square().mean().backward()
    sparsify_model(model, .6)
    opt.step()
    assert violations(model, opt)==[]

def test_sparsifying_between_fits_clears_the_past():
    for opt_func in (Adam,ranger,optimizers['torch_adam']):
        learn,witness = tiny_learner(opt_func=opt_func),Witness()
        learn.fit(2)
        sparsify_model(learn, .6)
        assert violations(learn.model, learn.opt)==[]
        learn.fit(1, cbs=witness)
        assert witness.seen==[] and witness.steps==4

def test_permanent_model_trains_densely():
    learn = sparse_learner(.6)
    learn.fit(1)
    make_permanent(learn.model)
    learn.fit(1)
    assert measured_sparsity(learn.model, '__ALL_PRUNABLE__')<.2

def test_nothing_of_the_learner_is_shadowed():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = sparse_learner(.6)
        learn.fit(1, cbs=[GMPruningModifier(.6, .8, 0, 1, .5), GradientClip(1.)])

# masks that change while training

def memories(learn): return {p.name:[m.clone() for m in memory(learn.opt, p.param)] for p in masked_params(learn.model)}

def test_cutting_keeps_the_momentum_of_what_stays():
    learn = sparse_learner(.3, opt_func=Adam)
    learn.fit(1)
    before,kept = memories(learn),{}
    gmp = GMPruningModifier(.6, .6, 0, 1, 1)
    learn.fit(1, cbs=[gmp, Note('before_batch', lambda cb: kept.update(memories(cb.learn)) if cb.iter==0 else None)])
    for p in masked_params(learn.model):
        assert len(before[p.name])==2
        for a,b in zip(before[p.name], kept[p.name]): assert b.equal(a*p.mask) and b.count_nonzero()>0

def dynamic_learner(kwargs, accumulate=None, opt_func=Adam, **extra):
    learn = sparse_learner(.6, opt_func=opt_func, splitter=halves, n_trn=10, **extra)
    return learn,DynamicSparseTrainingCallback(**{**kwargs,'every':5,'T_end':1.})

@pytest.mark.parametrize('opt_func', [optimizers[n] for n in ('sgd','adam','ranger','lookahead','torch_sgd','torch_adamw')]+[strange['spread']])
@pytest.mark.parametrize('kwargs', [RigL_kwargs,SET_kwargs], ids=['rigl','set'])
def test_exchanged_weights_and_memory(kwargs, opt_func):
    learn,dst = dynamic_learner(kwargs, opt_func=opt_func)
    n,witness = n_masked(learn.model),Witness()
    first = [p.mask.clone() for p in masked_params(learn.model)]
    learn.fit(3, cbs=[dst, witness])
    assert witness.seen==[] and n_masked(learn.model)==n
    assert not any(p.mask.equal(m) for p,m in zip(masked_params(learn.model), first))

def test_grown_weights_start_without_a_past():
    "New connections have weight 0 and no momentum, kept ones keep theirs"
    learn,dst = dynamic_learner(RigL_kwargs)
    ps,state = masked_params(learn.model),{}
    def _before(cb): state.update({p.name:(p.mask.clone(), p.param.detach().clone(), [m.clone() for m in memory(cb.opt, p.param)]) for p in ps})
    def _after(cb): return [(p.name, p.mask.clone(), p.param.detach().clone(), [m.clone() for m in memory(cb.opt, p.param)], state[p.name]) for p in ps if not p.mask.equal(state[p.name][0])]
    seen = Note('after_step', _after, order=200)
    learn.fit(2, cbs=[dst, seen, Note('before_step', _before, order=1)])
    changes = sum(seen.notes, [])
    assert len(changes)>=6
    for _,mask,w,memo,(mask0,w0,memo0) in changes:
        grown,kept = mask&~mask0,mask&mask0
        assert grown.any() and w[grown].count_nonzero()==0 and all(m[grown].count_nonzero()==0 for m in memo)
        assert w[kept].equal(w0[kept]) and all(m[kept].equal(m0[kept]) for m,m0 in zip(memo,memo0))

def test_replaced_step_leaves_no_gradient_behind():
    learn,dst = dynamic_learner(RigL_kwargs)
    left = Note('after_batch', lambda cb: sum(0. if p.grad is None else p.grad.abs().sum().item() for p in cb.model.parameters()))
    learn.fit(2, cbs=[dst, left])
    assert set(left.notes)=={0.}

def test_exchange_counts_optimizer_steps_under_accumulation():
    "40 batches, 20 steps, exchanged in place of one after each 5 of them, on complete gradients"
    learn,dst = dynamic_learner(RigL_kwargs)
    steps,exchanges = Note('after_step', lambda cb: cb.iter),[]
    exchange = dst._exchange
    dst._exchange = lambda: (exchanges.append(learn.iter), exchange())
    learn.fit(4, cbs=[dst, steps, GradientAccumulation(16), Witness()])
    assert len(steps.notes)==20 and exchanges==[1,3,5] and violations(learn.model, learn.opt)==[]

@pytest.mark.parametrize('use_reentrant', [True,False])
def test_recomputed_layers_are_exchanged_by_dense_gradients(use_reentrant):
    "With gradient checkpointing and without, the same connections grow"
    class Checkpointed(nn.Module):
        def __init__(self, on): super().__init__(); self.m,self.on = mlp(),on
        def forward(self, x): return self.m[4](checkpoint(self.m[:4], x.requires_grad_(), use_reentrant=use_reentrant) if self.on else self.m[:4](x))
    def _run(on):
        learn = sparse_learner(.6, model=Checkpointed(on), n_trn=10)
        learn.fit(2, cbs=DynamicSparseTrainingCallback(**{**RigL_kwargs, 'every':5, 'T_end':1.}))
        return weights(learn.model)
    assert same(_run(True), _run(False))

def test_frozen_layers_are_not_exchanged():
    learn,dst = dynamic_learner(RigL_kwargs)
    learn.freeze()
    before = learn.model[0].weight_mask.clone(),learn.model[4].weight_mask.clone()
    learn.fit(2, cbs=dst)
    assert learn.model[0].weight_mask.equal(before[0]) and not learn.model[4].weight_mask.equal(before[1]) and violations(learn.model, learn.opt)==[]

def test_no_exchange_on_a_skipped_step():
    learn,dst = dynamic_learner({**RigL_kwargs})
    learn.fit(3, cbs=[dst, Overflow(), Witness()])
    assert violations(learn.model, learn.opt)==[] and all(p.isfinite().all() for p in learn.model.parameters())

def test_exchange_is_the_same_in_each_run():
    def _run():
        learn,dst = dynamic_learner(SET_kwargs)
        learn.fit(2, cbs=dst)
        return weights(learn.model)
    assert same(_run(), _run())

# processes

_ddp = '''
import os,sys,torch,torch.distributed as dist
from torch import nn
from fastsparse_create.masking import *
rank,g = int(sys.argv[1]),torch.Generator().manual_seed(int(sys.argv[1]))
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4,16), nn.ReLU(), nn.Linear(16,2))
def mask_anew(): [set_mask(p, torch.rand(p.param.shape, generator=g)>.5) for p in attach_masks(model)]
def violations():
    slots = [(p,s) for p in masked_params(net) for s in [p.param.detach(), *(v for v in opt.state[p.param].values() if torch.is_tensor(v))]]
    return [p.name for p,s in slots if s[~p.mask].count_nonzero()]
mask_anew()
net = nn.parallel.DistributedDataParallel(model)
opt = torch.optim.SGD(net.parameters(), .1, momentum=.9, weight_decay=.1)
assert [p.name for p in masked_params(net)]==['0.weight','2.weight']
for step in range(6):
    if step==3 and rank==0: mask_anew()
    (net(torch.randn(8,4,generator=g))-1).square().mean().backward()
    opt.step()
    opt.zero_grad()
    if step==3: mask_optimizer(opt, masked_params(net))  # rank 1 got its masks with the forward pass
    else: assert not violations(), (rank, step, violations())
for t in [*net.parameters(), *(p.mask for p in masked_params(net))]:
    other = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(other, t.detach().contiguous())
    assert other[0].equal(other[1])
dist.barrier()
print('agreed', flush=True)
os._exit(0)
'''

@pytest.mark.slow
def test_distributed_ranks_agree(tmp_path):
    "Rank 0's masks reach the other rank with the next forward pass, and hold there"
    root = Path(__file__).parent
    args = [sys.executable, '-W', 'ignore', '-c', _ddp]
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(root.parent)}
    ranks = [subprocess.Popen([*args, str(r), str(tmp_path/'rendezvous')], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=120) for p in ranks]
    assert [out for out,_ in said]==['agreed\n']*2, said
