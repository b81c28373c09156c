"Top-KAST: sparse in what it computes, dense in what it stores, until its window closes"
import os,pickle,pytest,subprocess,sys
import torch.nn.functional as F
from copy import deepcopy
from fastai.callback.fp16 import MixedPrecision
from functools import partial
from test_manager import adam,assert_equal_epochs,assert_resumes,assert_skips_overflows,by_fit,by_loop,managed,sgd
from utils import *
from fastsparse_create.callback.learning_rate import *
from fastsparse_create.callback.powerpropagation import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.quantization import *
from fastsparse_create.callback.topkast import *
from fastsparse_create.effective import *
from fastsparse_create.recipe.compile import Recipe
from fastsparse_create.selection import *

def topkast(start=0., end=3., every=.5, forward=.8, backward=.5, **kwargs): return TopKASTPruningModifier(forward, backward, start, end, every, **kwargs)

def stored(model): return {n:s.param.detach().clone() for n,s in prunable(model).items()}
def read(model): return {n:getattr(*s.owners[0]).detach().clone() for n,s in prunable(model).items()}
def n_zeros(ws): return sum((w==0).sum().item() for w in ws.values())
def numel(model): return sum(s.param.numel() for s in prunable(model).values())
def is_open(model): return all(effective_functions(*s.owners[0]) for s in prunable(model).values())

def sparse_copy(model):
    "What the model is to compute: an ordinary one with masked weights"
    plain = mlp()
    plain.load_state_dict({k:v for k,v in model.state_dict().items() if not k.endswith('_mask')})
    masks = {p.name:p.mask for p in masked_params(model)}
    for n,p in plain.named_parameters(): p.data.mul_(masks.get(n, 1))
    return plain

x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

# what is computed, and what is stored

@pytest.mark.parametrize('is_global', [True,False])
def test_sparse_in_every_pass_and_exact_at_the_end(is_global):
    look = lambda cb: (n_zeros(read(cb.model)),n_zeros(stored(cb.model)))
    passes,ends = Note('after_pred', look),Note('after_epoch', look)
    learn = tiny_learner()
    learn.fit(4, cbs=[topkast(end=3., global_sparsity=is_global), passes, ends])
    expected = round(352*.8) if is_global else sum(round(n*.8) for n in (64,256,32))
    assert passes.notes==[(expected,0)]*12+[(expected,expected)]*4 and ends.notes==[(expected,0)]*3+[(expected,expected)]
    assert n_masked(learn.model)==expected and violations(learn.model, learn.opt)==[] and all(p.is_enforced for p in masked_params(learn.model))
    assert all(type(m) is nn.Linear for m in (learn.model[0],learn.model[2],learn.model[4])) and '0.weight_reach' not in dict(learn.model.named_buffers())

def test_window_that_opens_later():
    learn = tiny_learner()
    notes = Note('after_pred', lambda cb: n_zeros(read(cb.model)))
    learn.fit(3, cbs=[topkast(1.5, 2.5, .5), notes])
    assert notes.notes==[0]*6+[282]*6
    assert measured_sparsity(learn.model)==282/352

def test_validation_and_predictions_compute_with_active_weights():
    learn = tiny_learner()
    learn.fit(2, cbs=topkast(end=3.))
    expected = sparse_copy(learn.model)(x)
    with torch.no_grad(): assert learn.model.eval()(x).equal(expected)
    preds,targs = learn.get_preds()
    assert preds.equal(sparse_copy(learn.model)(learn.dls.valid.dataset.tensors[0]).detach())
    assert learn.validate()[0]==pytest.approx(F.mse_loss(preds, targs).item(), rel=1e-6)

def test_gradients_are_those_of_the_sparse_network_within_reach():
    learn = tiny_learner()
    learn.fit(1, cbs=topkast(global_sparsity=False))
    plain = sparse_copy(learn.model)
    for m in learn.model,plain:
        m.zero_grad()
        m(x).square().sum().backward()
    grads = {n:p.grad for n,p in plain.named_parameters()}
    for p in masked_params(learn.model):
        reach = p.owners[0][0].weight_reach
        assert torch.equal(p.param.grad, grads[p.name]*reach) and p.param.grad[reach & ~p.mask].any()
        assert not (p.mask & ~reach).any()
    assert sum((~m.weight_reach).sum().item() for m in learn.model if hasattr(m, 'weight_reach'))==176
    assert learn.model[0].bias.grad.equal(grads['0.bias'])

optimizers = dict(sgd=partial(SGD, mom=.9, wd=.1), adam=partial(Adam, wd=.1), l2=partial(SGD, mom=.9, wd=.1, decouple_wd=False), ranger=ranger, torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW),
                  torch_sgd=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, weight_decay=.1)))

@pytest.mark.parametrize('name', optimizers)
def test_what_is_out_of_reach_stands_still(name):
    "Momentum, decay and averages would move it"
    seen = []
    def look(cb):
        mods = [m for m in cb.model if isinstance(m, nn.Linear)]
        return [(m._parameters['weight'].detach().clone(),m.weight_reach.clone()) for m in mods]
    before,after = Note('before_step', look, order=8),Note('after_batch', look)
    learn = tiny_learner(opt_func=optimizers[name])
    learn.fit(3, cbs=[topkast(end=4., every=.5), before, after])
    moved = 0
    for b,a in zip(before.notes, after.notes):
        for (w0,r0),(w1,r1) in zip(b, a):
            assert torch.equal(r0, r1) and torch.equal(w0[~r0], w1[~r0])
            moved += (w0!=w1).sum().item()
    assert moved
    reached = torch.stack([torch.cat([r.flatten() for _,r in b]) for b in before.notes])
    assert (reached[0]!=reached[-1]).any()  # others have taken places

@pytest.mark.parametrize('name', optimizers)
def test_no_memory_of_what_is_out_of_reach(name):
    learn = tiny_learner(opt_func=optimizers[name])
    learn.fit(2, cbs=topkast(end=3.))
    for p in masked_params(learn.model):
        reach = p.owners[0][0].weight_reach
        for slot in memory(learn.opt, p.param): assert not slot[~reach].any() or torch.equal(slot[~reach], p.param[~reach])  # the slow weights of Lookahead
    learn.fit(1, cbs=topkast(end=1.))
    witness = Witness()
    learn.fit(1, cbs=witness)
    assert witness.seen==[]

def test_decay_follows_the_learning_rates_of_groups():
    learn = tiny_learner(splitter=halves, opt_func=SGD, lr=slice(.1, .2))
    learn.loss_func = lambda pred,y: 0*pred.sum()
    before,after = Note('before_step', lambda cb: stored(cb.model), order=8),Note('after_batch', lambda cb: stored(cb.model))
    learn.fit(1, slice(.1, .2), wd=0., cbs=[topkast(active_weight_decay=.1, backward=0., every=-1), before, after])
    w,active = before.notes[0],read(learn.model)
    for n,lr in (('0.weight',.1),('4.weight',.2)):
        ratio = after.notes[0][n]/w[n]
        assert {round(r, 5) for r in ratio.flatten().tolist()} <= {round(1-lr*.1, 5), round(1-lr*.1/.2, 5)}
        assert len({round(r, 4) for r in ratio.flatten().tolist()})==2

# patterns

@pytest.mark.parametrize('mask_type,forward', [('2:4',.5), ('block4',.75), ('[2, 2]',.75), ('filter',.5)])
def test_patterns(mask_type, forward):
    learn = tiny_learner()
    seen = Note('after_pred', lambda cb: (read(cb.model)['2.weight']!=0, cb.model[2].weight_reach.clone()) if is_open(cb.model) else None)
    learn.fit(3, cbs=[topkast(end=2., forward=forward, backward=.25, mask_type=mask_type, global_sparsity=False, params='2.weight'), seen])
    gmp = tiny_learner()
    gmp.fit(3, cbs=MagnitudePruningModifier(forward, forward, 0, 2, 1, mask_type=mask_type, params='2.weight'))
    assert n_masked(learn.model)==n_masked(gmp.model)
    if mask_type=='2:4': assert (learn.model[2].weight_mask.view(-1, 4).sum(1)==2).all()

class Doubled(nn.Module):
    def forward(self, w): return 2*w

def doubled():
    layer = nn.Linear(6, 5)
    nn.utils.parametrize.register_parametrization(layer, 'weight', Doubled())
    return layer

@pytest.mark.parametrize('layer,shape', [(nn.Linear(6, 5), (4,6)), (nn.Conv1d(3, 4, 3), (2,3,8)), (nn.Conv2d(3, 4, 3), (2,3,8,8)), (nn.Conv3d(2, 3, 2), (2,2,4,4,4)),
    (nn.ConvTranspose1d(3, 4, 3), (2,3,8)), (nn.ConvTranspose2d(3, 4, 3), (2,3,8,8)), (nn.ConvTranspose3d(2, 3, 2), (2,2,4,4,4)), (nn.Conv2d(4, 4, 3, groups=2), (2,4,8,8)), (nn.RNNCell(6, 5), (4,6)),
    (nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), (2,5,8)), (nn.Embedding(7, 3), None), (doubled(), (4,6))], ids=lambda o: type(o).__name__)
def test_layers(layer, shape):
    "The output is that of the same layer with masked weights, in training and in evaluation"
    torch.manual_seed(1)
    layer = deepcopy(layer) if not hasattr(layer, 'parametrizations') else layer
    inp = torch.randint(7, (4,)) if shape is None else torch.randn(shape)
    plain,names = pickle.loads(pickle.dumps(layer)) if not hasattr(layer, 'parametrizations') else doubled(),[n for n,s in named_sites(layer).items() if s.param.ndim>1 and 'norm' not in n]
    plain.load_state_dict(layer.state_dict())
    ps = attach_masks(layer, names, enforce=False)
    for p,m in zip(ps, top_masks(ps, .5)):
        p.mask.copy_(m)
        for module,attr in p.owners:
            module.register_buffer(f'{attr}_reach', torch.ones_like(m), persistent=False)
            use_effective(module, attr, active_weight)
        dict(plain.named_parameters())[p.name].data.mul_(m)
    for mode in True,False:
        layer.train(mode), plain.train(mode)
        assert torch.allclose(layer(inp), plain(inp), atol=1e-6)
        with torch.no_grad(): assert torch.allclose(layer(inp), plain(inp), atol=1e-5)
    layer.train(), plain.train()
    layer(inp).square().sum().backward(), plain(inp).square().sum().backward()
    for (n,p),q in zip(layer.named_parameters(), plain.parameters()): assert torch.allclose(p.grad, q.grad, atol=1e-5), n

def test_tied_weights_are_masked_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4, 4),nn.Linear(4, 4)
            self.b.weight = self.a.weight
        def forward(self, x): return self.b(self.a(x))[:,:2]
    learn = tiny_learner(Tied())
    learn.fit(2, cbs=topkast(end=3.))
    assert learn.model.a.weight.equal(learn.model.b.weight) and n_zeros(read(learn.model))==round(16*.8)
    learn.fit(2, cbs=topkast(end=1.))
    assert learn.model.a.weight is learn.model.b.weight and measured_sparsity(learn.model)==round(16*.8)/16

def test_refused_before_anything_changes():
    model = nn.Sequential(nn.LSTM(4, 4, batch_first=True))
    learn = tiny_learner(model)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="'0.weight_ih_l0' can't be computed from what is stored, as LSTM keeps a list of its weights: leave it out of params"): learn.fit(1, cbs=topkast())
    assert list(model.state_dict())==keys and not masked_params(model) and not model[0]._forward_pre_hooks

@pytest.mark.parametrize('make,error,message', [
    (lambda: topkast(forward=1.), ValueError, 'forward_sparsity must be between'), (lambda: topkast(forward='.8'), TypeError, 'forward_sparsity'), (lambda: topkast(backward=.9), ValueError, 'backward_sparsity must be at most forward_sparsity 0.8'),
    (lambda: topkast(backward=-.1), ValueError, 'backward_sparsity'), (lambda: topkast(end=-1), ValueError, 'end_epoch must be given'), (lambda: topkast(2, 1), ValueError, 'end_epoch 1 lies before start_epoch 2'),
    (lambda: topkast(active_weight_decay=-1), ValueError, 'active_weight_decay'), (lambda: topkast(global_sparsity=1), TypeError, 'global_sparsity'), (lambda: topkast(mask_type='2:5:'), ValueError, 'mask_type'),
    (lambda: topkast(mask_type='2:4', global_sparsity=False), ValueError, 'forward_sparsity must be 0.5'), (lambda: topkast(forward=.5, backward=.1, mask_type='2:4'), ValueError, 'global_sparsity must be false'),
    (lambda: topkast(leave_enabled='yes'), TypeError, 'leave_enabled'), (lambda: topkast(params=3), TypeError, 'params')])
def test_arguments(make, error, message):
    with pytest.raises(error, match=message): make()

def test_recipe():
    text = '''
modifiers:
  - !TopKASTPruningModifier
    forward_sparsity: 0.8
    backward_sparsity: 0.5
    start_epoch: 0.0
    end_epoch: 2.0
    update_frequency: 0.5
    params: __ALL_PRUNABLE__
    active_weight_decay: 0.0001
'''
    recipe = Recipe.from_string(text)
    assert str(Recipe.from_string(str(recipe)))==str(recipe)
    learn = tiny_learner()
    learn.fit(2, cbs=recipe.callbacks())
    assert measured_sparsity(learn.model)==282/352
    assert repr(recipe.compile()[0])==repr(topkast(0., 2., .5, params='__ALL_PRUNABLE__'))

# other callbacks

def test_several_fits_are_one():
    whole,parts,mod = tiny_learner(),tiny_learner(),topkast(end=4., every=.75)
    whole.fit(4, cbs=topkast(end=4., every=.75))
    for _ in range(4): parts.fit(1, cbs=mod)
    assert same(weights(whole.model), weights(parts.model)) and measured_sparsity(parts.model)==282/352

def test_fine_tune():
    learn = tiny_learner(splitter=halves)
    learn.fine_tune(3, cbs=topkast(end=3.))
    assert measured_sparsity(learn.model)==282/352 and violations(learn.model, learn.opt)==[]

def test_lr_find_in_the_window_leaves_everything_as_it_is():
    learn = tiny_learner(cbs=topkast(end=3.), n_trn=8)
    learn.fit(1)
    before,n = stored(learn.model),n_zeros(read(learn.model))
    learn.lr_find(show_plot=False, num_it=6)
    assert same(before, stored(learn.model)) and n_zeros(read(learn.model))==n==282
    learn.fit(2)
    assert measured_sparsity(learn.model)==282/352

def test_leave_enabled_false_lets_weights_train_again():
    learn = tiny_learner(lr=.1)
    notes = Note('after_pred', lambda cb: n_zeros(read(cb.model)))
    learn.fit(4, cbs=[topkast(end=2., leave_enabled=False), notes])
    assert notes.notes[:9]==[282]*9 and notes.notes[-1]<200 and not any(p.is_enforced for p in masked_params(learn.model))
    learn.fit(1)
    assert n_masked(learn.model)==282 and n_zeros(stored(learn.model))<200

@pytest.mark.parametrize('swap', [False,True])
def test_another_pruner_follows(swap):
    mods = [topkast(end=2.), GMPruningModifier(.85, .9, 2, 4, 1, global_sparsity=True)]
    notes = Note('after_pred', lambda cb: (n_zeros(read(cb.model)),n_zeros(stored(cb.model))))
    learn = tiny_learner()
    learn.fit(5, cbs=[*mods[::1-2*swap], notes])
    assert notes.notes[:8]==[(282,0)]*8 and notes.notes[8]==(299,299) and notes.notes[-1]==(317,317)
    learn,mods = tiny_learner(),[topkast(end=2.), GMPruningModifier(.85, .9, 2, 4, 1, global_sparsity=True)]
    for _ in range(5): learn.fit(1, cbs=mods[::1-2*swap])
    assert notes.notes[-1][0]==n_zeros(stored(learn.model))

@pytest.mark.parametrize('swap', [False,True])
def test_after_another_pruner(swap):
    "It starts from what it finds: weights that are 0 are the smallest"
    mods = [GMPruningModifier(.2, .5, 0, 1, .5, global_sparsity=True), topkast(1., 3.)]
    notes = Note('after_pred', lambda cb: n_zeros(read(cb.model)))
    learn = tiny_learner()
    learn.fit(4, cbs=[*mods[::1-2*swap], notes])
    assert set(notes.notes[4:])=={282} and violations(learn.model, learn.opt)==[]

def test_overlaps_are_refused():
    with pytest.raises(ValueError, match='both prune'): tiny_learner().fit(1, cbs=[topkast(end=3.), GMPruningModifier(0., .5, 1, 2, .5)])

def test_with_powerpropagation():
    "Schwarz et al. combine them: the largest powers are those of the largest weights"
    learn = tiny_learner()
    notes = Note('after_pred', lambda cb: (n_zeros(read(cb.model)),n_zeros(stored(cb.model))))
    learn.fit(4, cbs=[topkast(end=3.), PowerpropagationModifier(0., 3., alpha=2.), notes])
    assert notes.notes[0][0]==282 and notes.notes[-1]==(282,282) and set(notes.notes[:12])=={(282,0)}
    assert type(learn.model[0]) is nn.Linear

def test_quantization_waits():
    with pytest.raises(ValueError, match='quantization starts at epoch 1, before this has ended'): tiny_learner().fit(3, cbs=[topkast(end=3.), QuantizationModifier(1.)])
    learn = tiny_learner()
    learn.fit(3, cbs=[topkast(end=2.), QuantizationModifier(2.)])
    assert type(learn.model[2]).__name__=='QuantLinear' and measured_sparsity(learn.model)==282/352

def test_accumulation_and_clipping():
    learn = tiny_learner(n_trn=8)
    learn.fit(3, cbs=[topkast(end=2.), GradientAccumulation(16), GradientClip(.1)])
    assert measured_sparsity(learn.model)==282/352 and violations(learn.model, learn.opt)==[]

def test_mixed_precision():
    learn = tiny_learner().to_fp16()
    learn.fit(3, cbs=topkast(end=2.))
    assert measured_sparsity(learn.model)==282/352

def test_cancelled_steps_change_nothing():
    class Cancel(Callback):
        order,run_valid = 20,False
        def before_step(self): raise CancelStepException
    learn = tiny_learner()
    first = stored(learn.model)
    learn.fit(2, wd=0., cbs=[topkast(end=3., active_weight_decay=.1), Cancel()])
    assert same(first, stored(learn.model))

# checkpoints

def test_checkpoints_hold_dense_weights_and_sparse_networks(tmp_path):
    learn = tiny_learner(path=tmp_path)
    learn.fit(2, cbs=[topkast(end=4.), SaveModelCallback(every_epoch=True)])
    state = torch.load(tmp_path/'models/model_1.pth', weights_only=True)
    assert same({n:state[n] for n in stored(learn.model)}, stored(learn.model)) and not any('reach' in k for k in state)
    fresh = mlp()
    masks_from_file(fresh, tmp_path/'models/model_1.pth')
    assert fresh(x).equal(learn.model(x)) and measured_sparsity(fresh)==282/352

@pytest.mark.parametrize('name', ['sgd','adam','ranger','torch_adamw'])
def test_resumed_in_a_fresh_learner_is_uninterrupted(name, tmp_path):
    whole,resumed = (tiny_learner(path=tmp_path, opt_func=optimizers[name]) for _ in range(2))
    whole.fit(4, cbs=[topkast(end=3.), SaveModelCallback(every_epoch=True, with_opt=True)])
    attach_masks(resumed.model, enforce=False)
    resumed.create_opt()
    resumed.load('model_1')
    resumed.fit(4, cbs=topkast(end=3.), start_epoch=2)
    assert same(weights(whole.model), weights(resumed.model)) and violations(resumed.model, resumed.opt)==[]

def test_resumed_after_the_end(tmp_path):
    whole,resumed = (tiny_learner(path=tmp_path) for _ in range(2))
    whole.fit(4, cbs=[topkast(end=2.), SaveModelCallback(every_epoch=True, with_opt=True)])
    masks_from_file(resumed.model, tmp_path/'models/model_2.pth')
    resumed.create_opt()
    resumed.load('model_2')
    resumed.fit(4, cbs=topkast(end=2.), start_epoch=3)
    assert same(weights(whole.model), weights(resumed.model)) and violations(resumed.model, resumed.opt)==[]

def test_resume_warns_of_lost_weights(tmp_path, caplog):
    whole,resumed = (tiny_learner(path=tmp_path) for _ in range(2))
    whole.fit(2, cbs=[topkast(end=3.), SaveModelCallback(every_epoch=True)])
    masks_from_file(resumed.model, tmp_path/'models/model_1.pth')
    resumed.fit(4, cbs=topkast(end=3.), start_epoch=2)
    assert 'load it after attach_masks(model, enforce=False)' in caplog.text and measured_sparsity(resumed.model)==282/352

def test_best_epoch_of_the_window_comes_back_sparse(tmp_path):
    learn = tiny_learner(path=tmp_path)
    outputs = Note('after_epoch', lambda cb: cb.model(x).detach())
    learn.fit(4, cbs=[topkast(end=3.), SaveModelCallback(every_epoch=True), outputs])
    learn.load('model_1')
    assert measured_sparsity(learn.model)==282/352
    assert learn.model(x).equal(outputs.notes[1])
    assert violations(learn.model)==[]

def test_best_epoch_within_the_window(tmp_path):
    "What `SaveModelCallback` loads at the end computes what it did when it was saved"
    learn = tiny_learner(path=tmp_path)
    first = Note('after_epoch', lambda cb: cb.model(x).detach())
    learn.fit(3, cbs=[topkast(end=2.), SaveModelCallback(monitor='train_loss', comp=np.greater), first])
    assert learn.model(x).equal(first.notes[0]) and measured_sparsity(learn.model)==282/352 and violations(learn.model)==[]

@pytest.mark.parametrize('copy_', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
def test_copies_compute_the_same(copy_):
    learn = tiny_learner()
    learn.fit(2, cbs=topkast(end=3.))
    copied = copy_(learn.model)
    assert copied(x).equal(learn.model(x)) and same(stored(copied), stored(learn.model)) and is_open(copied)
    copied[0]._parameters['weight'].data.zero_()
    assert not copied(x).equal(learn.model(x))
    copied(x).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())

def test_export(tmp_path):
    learn = tiny_learner(path=tmp_path, cbs=topkast(end=3.))
    learn.fit(2)
    learn.export('e.pkl')
    loaded,dls = load_learner(tmp_path/'e.pkl'),tiny_dls()
    assert loaded.model(x).equal(learn.model(x))
    loaded.dls = dls
    for l in learn,loaded: l.fit(2)
    assert measured_sparsity(loaded.model)==measured_sparsity(learn.model)==282/352

def test_window_is_open_when_training_ends():
    learn = tiny_learner()
    learn.fit(2, cbs=topkast(end=3.))
    y = learn.model(x)
    learn.fit(1, lr=0.)
    assert learn.model(x).equal(y)
    store_effective(learn.model)
    assert learn.model(x).equal(y) and measured_sparsity(learn.model)==282/352 and type(learn.model[0]) is nn.Linear

def test_early_stopping_and_on():
    learn,mod = tiny_learner(lr=0.),topkast(end=4.)
    learn.fit(4, cbs=[mod, EarlyStoppingCallback(monitor='valid_loss', patience=1)])
    assert is_open(learn.model)
    learn.fit(4, lr=.05, cbs=mod)
    assert measured_sparsity(learn.model)==282/352

# exceptions

@pytest.mark.parametrize('error', [ValueError,KeyboardInterrupt])
@pytest.mark.parametrize('at', [0,5])
def test_interrupted_forward_pass_breaks_nothing(error, at):
    class Fails(nn.Module):
        n = -1
        def forward(self, x):
            self.n += 1
            if self.n==at: raise error
            return x
    learn = tiny_learner(nn.Sequential(*mlp(), Fails()))
    mod = topkast(end=3.)
    with pytest.raises(error): learn.fit(3, cbs=mod)
    copied = deepcopy(learn.model)
    learn.fit(4, cbs=mod)
    assert measured_sparsity(learn.model)==282/352 and violations(learn.model, learn.opt)==[]

# compiled models

@pytest.mark.parametrize('when', ['before','called','after'])
def test_compiled(when):
    from torch._dynamo import reset
    def compiled(model): return torch.compile(model, backend='eager')
    reset()
    expected,learn = tiny_learner(),tiny_learner()
    expected.fit(3, cbs=topkast(end=2.))
    if when!='after': learn.model = compiled(learn.model)
    if when=='called': learn.model(x), learn.model(x).sum().backward(), learn.model.zero_grad()
    mod = topkast(end=2.)
    learn.fit(1, cbs=mod)
    if when=='after': learn.model = compiled(learn.model)
    learn.fit(2, cbs=mod)
    for a,b in zip(weights(expected.model).values(), weights(learn.model).values()): assert torch.allclose(a, b, atol=1e-6)
    assert measured_sparsity(learn.model)==282/352

# plain loops

cases = dict(
    half        = lambda: [topkast(.5, 3., .5)],
    every       = lambda: [topkast(0., 4., -1)],
    seldom      = lambda: [topkast(0., 3.5, 1.5)],
    local       = lambda: [topkast(1., 3., .25, global_sparsity=False, params=['2.weight'])],
    pattern     = lambda: [topkast(0., 3., .5, .5, .25, mask_type='2:4', global_sparsity=False, params=['2.weight'])],
    released    = lambda: [topkast(0., 2., .5, leave_enabled=False)],
    open        = lambda: [topkast(0., 5., .75)],
    lr          = lambda: [topkast(0., 3., .5, active_weight_decay=.01), LearningRateFunctionModifier('cosine', .05, .001, .5, 3.5)],
    clip        = lambda: [topkast(0., 3., .5), GradientClip(.05)],
    powers      = lambda: [topkast(0., 3., .5), PowerpropagationModifier(0., 3., alpha=2.)],
    then_gmp    = lambda: [topkast(0., 2., .5), GMPruningModifier(.8, .9, 2, 4, .5)],
)

@pytest.mark.parametrize('opt_func', [sgd,adam], ids=['sgd','adam'])
@pytest.mark.parametrize('name', cases)
def test_equals_fit(name, opt_func): assert_equal_epochs(by_fit(opt_func, cases[name]), by_loop(opt_func, cases[name]))

@pytest.mark.parametrize('at,first', [(1,'model'), (8,'manager'), (13,'manager'), (16,'model'), (21,'model'), (30,'manager')])
@pytest.mark.parametrize('name', [n for n in cases if n!='clip'])
def test_resumed_loop(name, at, first): assert_resumes(cases[name], at, first, noop)

@pytest.mark.parametrize('name', ['half','powers'])
def test_scaled(name):
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=5)
    assert_equal_epochs(by_fit(sgd, cases[name]), by_loop(sgd, cases[name], scaler=scaler))

@pytest.mark.parametrize('name', ['half','seldom','powers'])
def test_overflows_are_no_steps(name): assert_skips_overflows(sgd, cases[name])

# several processes

_ddp = '''
import sys; sys.path.insert(0, sys.argv[3])
from utils import *
from fastsparse_create.callback.powerpropagation import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.topkast import *
import torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)
def agree(t):
    both = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(both, t.detach().contiguous())
    return both[0].equal(both[1])
for mods in (lambda: [TopKASTPruningModifier(.8, .5, 0, 2, .25)], lambda: [PowerpropagationModifier(0, 2, alpha=3.), GMPruningModifier(0., .8, 0, 2, .5, global_sparsity=True)]):
    for broadcasts in (True,False):
        for end in (2,3):
            model = mlp()
            net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcasts)
            learn = tiny_learner(net, seed=rank, n_trn=8, opt_func=Adam, lr=.01)
            learn.fit(end, cbs=mods())
            for t in [*model.parameters(), *(p.mask for p in masked_params(model))]: assert agree(t), broadcasts
            assert violations(model, learn.opt)==[] and measured_sparsity(model)==282/352
assert not agree(learn.dls.train.one_batch()[0])
dist.barrier()
print('agreed', flush=True)
os._exit(0)
'''

@pytest.mark.slow
def test_ranks_agree(tmp_path):
    "Each rank has batches of its own"
    root = Path(__file__).parent
    args,env = [sys.executable, '-W', 'ignore', '-c', _ddp],{**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(root.parent)}
    ranks = [subprocess.Popen([*args, str(r), str(tmp_path/'store'), str(root)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=120) for p in ranks]
    assert [out for out,_ in said]==['agreed\n']*2, said

# accuracy

def _digits(cbs, seed):
    from sklearn.datasets import load_digits
    d = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(7))
    x,y = torch.tensor(d.images, dtype=torch.float32)[order]/16,torch.tensor(d.target)[order]
    dls = DataLoaders.from_dsets(list(zip(x[:1200], y[:1200])), list(zip(x[1200:], y[1200:])), bs=32, num_workers=0)
    set_seed(seed, True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,128), nn.ReLU(), nn.Linear(128,64), nn.ReLU(), nn.Linear(64,10))
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy, opt_func=Adam)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(16, 5e-3, cbs=cbs)
    assert measured_sparsity(model, '__ALL_PRUNABLE__')==pytest.approx(.8, abs=1e-4)
    return 100*learn.recorder.values[-1][2]

@pytest.mark.slow
def test_digits():
    "Within two points of gradual magnitude pruning, in the mean of three seeds"
    def mean(cbs): return np.mean([_digits(cbs(), seed) for seed in range(3)])
    gmp = mean(lambda: [GMPruningModifier(0., .8, 0, 12, .25)])
    assert mean(lambda: [TopKASTPruningModifier(.8, .5, 0, 15, .25)])>gmp-2
    assert mean(lambda: [PowerpropagationModifier(0, 16, alpha=3.), GMPruningModifier(0., .8, 0, 12, .25)])>gmp-2

# what a model of an open window becomes

def _open_models():
    for cbs in [topkast()],[PowerpropagationModifier(0, 3, alpha=3.)],[PowerpropagationModifier(0, 3, alpha=3.), GMPruningModifier(0., .8, 0, 4, .5)],[topkast(), PowerpropagationModifier(0, 3, alpha=2.)]:
        learn = tiny_learner()
        learn.fit(2, cbs=cbs)
        yield learn

def test_make_permanent_stores_what_is_computed():
    for learn in _open_models():
        y,zeros = learn.model(x),n_zeros(read(learn.model))
        plain = make_permanent(deepcopy(learn.model))
        assert plain(x).equal(y) and list(plain.state_dict())==list(mlp().state_dict()) and n_zeros(stored(plain))==zeros

def test_sparsity_column_counts_what_is_computed():
    learn = tiny_learner()
    learn.fit(2, cbs=topkast(end=3.))
    assert learn.recorder.values[-1][-1]==282/352

def test_onnx(tmp_path):
    from fastsparse_create.export.onnx import export_onnx
    for learn in _open_models():
        assert export_onnx(learn.model, tmp_path/'m.onnx', x).rel_rms<1e-5
        assert is_open(learn.model)

def test_weights_that_are_written_behind_masks_of_powers():
    learn = tiny_learner()
    learn.fit(2, cbs=[PowerpropagationModifier(0, 3, alpha=3.), GMPruningModifier(0., .8, 0, 1, .5)])
    for s in prunable(learn.model).values(): s.param.data.fill_(1)
    learn.model(x)
    assert violations(learn.model)==[]
