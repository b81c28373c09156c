"Movement pruning, oBERT and M-FAC: the formulas, when gradients are gathered, and that all else is as with any pruner"
import pytest
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation,GradientClip
from utils import *
from test_manager import adam,assert_equal_epochs,assert_resumes,assert_skips_overflows,batches,by_fit,by_loop,managed,mse,n_epoch,n_iter,plain_steps,sgd
from test_dynamic import Overflow,optimizers
import fastsparse_create.fisher as fisher_module
from fastsparse_create.callback.movement import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.second_order import *
from fastsparse_create.create.manager import *
from fastsparse_create.criteria import seeded
from fastsparse_create.fisher import *
from fastsparse_create.masks.nm import *
from fastsparse_create.masks.structured import *
from fastsparse_create.selection import *

def masks(model): return {p.name:p.mask.clone() for p in masked_params(model)}
def zeros(model): return {p.name:int((~p.mask).sum()) for p in masked_params(model)}
movement = partial(MovementPruningModifier, .05, .8)
obs,mfac = partial(OBSPruningModifier, .05, .8, num_grads=4, damp=1e-3),partial(MFACPruningModifier, .05, .8, num_grads=4, damp=1e-3)

# Fisher matrices, by brute force

def dense_fisher(grads, damp, size):
    "Of a whole layer: correlations between blocks are 0"
    matrix,block = grads.T@grads/len(grads),torch.arange(grads.shape[1])//size
    return matrix*(block[:,None]==block)+damp*torch.eye(grads.shape[1], dtype=grads.dtype)

def cheapest(fisher, weights, cut):
    "The change of least cost among all that cut, and the cost"
    change,kept = torch.where(cut, -weights, 0.),~cut
    if kept.any(): change[kept] = torch.linalg.solve(fisher[kept][:,kept], -fisher[kept][:,cut]@change[cut])
    return change,change@fisher@change/2

def both_fishers(grads, damp, size):
    sums = torch.zeros(-(-grads.shape[1]//size), size, size, dtype=grads.dtype)
    for part in grads.split(3): add_gradients_(sums, part)
    return MatrixFisher(sums, len(grads), damp),GradientFisher(in_blocks(grads, size).transpose(0, 1), damp)

@pytest.mark.parametrize('numel,size,m,group', [(12,4,7,1), (12,4,7,2), (12,4,7,4), (10,4,3,1), (10,5,20,5), (6,6,1,1), (6,6,2,3), (5,1,4,1), (30,30,8,1)])
@pytest.mark.parametrize('damp', [1e-4,.1,10.])
@pytest.mark.parametrize('chunk', [1,1<<21])
def test_equals_the_dense_inverse(numel, size, m, group, damp, chunk, monkeypatch):
    monkeypatch.setattr(fisher_module, '_CHUNK', chunk)
    g = torch.Generator().manual_seed(numel*m)
    grads,weights = torch.randn(m, numel, generator=g).double(),torch.randn(numel, generator=g).double()
    dense,cut = dense_fisher(grads, damp, size),torch.rand(numel, generator=g)<.4
    for fisher in both_fishers(grads, damp, size):
        found = saliency(fisher, in_blocks(weights, size), group).flatten()[:numel]
        for i in range(0, numel, group):
            cost = cheapest(dense, weights, torch.arange(numel)//group==i//group)[1]
            torch.testing.assert_close(found[i:i+group], (cost/group).expand(min(group, numel-i)), rtol=1e-6, atol=0)
        change = compensation(fisher, in_blocks(weights, size), in_blocks(cut, size)).flatten()[:numel]
        torch.testing.assert_close(change, cheapest(dense, weights, cut)[0], rtol=1e-6, atol=1e-9)
        assert change[cut].equal(-weights[cut])

def test_values_of_sparseml():
    grads = torch.tensor([[1.,0,2,1], [0,1,1,1]])
    for fisher in both_fishers(grads, .1, 2):
        torch.testing.assert_close(fisher.inverse_groups().flatten(), torch.tensor([1.66667,1.66667,1.80328,4.26230]).double(), rtol=1e-5, atol=0)

def test_single_weights_follow_the_papers():
    "Score w^2 / 2 diag(F^-1), compensation -w_i F^-1 e_i / F^-1_ii"
    grads,weights = torch.randn(9, 5).double(),torch.randn(5).double()
    inverse = dense_fisher(grads, .01, 5).inverse()
    for fisher in both_fishers(grads, .01, 5):
        torch.testing.assert_close(saliency(fisher, weights[None])[0], weights**2/(2*inverse.diag()))
        for i in range(5):
            cut = (torch.arange(5)==i)[None]
            torch.testing.assert_close(compensation(fisher, weights[None], cut)[0], -weights[i]*inverse[:,i]/inverse[i,i])

@pytest.mark.parametrize('scale', [1e-12,1e-3,1.,1e4])
def test_gradients_of_any_size(scale):
    "Rounding doesn't make a matrix of few gradients indefinite"
    grads = torch.randn(100, 3)@torch.randn(3, 40)*scale
    for fisher in both_fishers(grads, 1e-7, 40):
        scores = saliency(fisher, torch.ones(1,40))
        assert scores.isfinite().all() and (scores>0).all()
        assert compensation(fisher, torch.ones(1,40), torch.rand(1,40)<.5).isfinite().all()

@pytest.mark.parametrize('shape,rows,cols', [((8,12),1,4), ((8,10),1,4), ((6,8,3,3),1,4), ((4,3,3,3),1,4), ((8,12),2,2), ((6,4,2),3,4), ((8,12),8,1), ((5,7),1,1), ((9,),1,1)])
def test_tiles_are_those_of_the_mask_type(shape, rows, cols):
    "Each tile lies together, and its weights share what they cost"
    x,layout = torch.randn(shape),BlockLayout(torch.Size(shape), 30, rows, cols)
    assert layout.size%(rows*cols)==0 and layout.back(layout.blocks(x)).equal(x)
    if rows*cols==1: return
    pattern = Block(rows, cols, ragged=True)
    tiles = layout.back(in_blocks(torch.arange(layout.numel)//(rows*cols), layout.size))
    expected = pattern.spread(torch.arange(len(pattern.pool(x))), x.shape)
    for t in tiles.unique(): assert len(expected[tiles==t].unique())==1
    assert len(tiles.unique())==len(expected.unique())

def test_scores_of_tiles():
    g = torch.Generator().manual_seed(1)
    weight,grads = torch.randn(3,6,2, generator=g).double(),torch.randn(9,3,6,2, generator=g).double()
    layout = BlockLayout(weight.shape, 8, 1, 4)
    flat = torch.stack([layout.flat(x) for x in grads])
    fisher = both_fishers(flat, .1, layout.size)[0]
    scores,matrix = layout.scores(fisher, weight),dense_fisher(flat, .1, layout.size)
    for o,k,cols in itertools.product(range(3), range(2), (slice(0,4),slice(4,6))):
        tile = torch.zeros_like(weight, dtype=torch.bool)
        tile[o,cols,k] = True
        cost = cheapest(matrix, layout.flat(weight), layout.flat(tile))[1]
        torch.testing.assert_close(scores[tile].sum(), cost)
        assert scores[tile].unique().numel()==1

# what a modifier does with it

class Given(Callback):
    "Gradients of the weight as given, one after the other, of any dtype and size"
    def __init__(self, grads): self.grads = grads
    def after_backward(self): self.model.weight.grad = self.grads[self.train_iter].clone().to(self.model.weight)

def cut_linear(modifier, grads, weight, lr=0.):
    "A linear layer after one epoch of `len(grads)` steps"
    batch = torch.zeros(1, weight.shape[1]),torch.zeros(1, weight.shape[0])
    model = nn.Linear(*weight.shape[::-1], bias=False)
    model.weight.data[:] = weight
    learn = tiny_learner(model, dls=DataLoaders([batch]*len(grads), [batch]), opt_func=SGD, lr=lr)
    learn.fit(1, cbs=[modifier, Given(grads)])
    return learn

@pytest.mark.parametrize('cls,kwargs', [(OBSPruningModifier,dict(fisher_block_size=6)), (OBSPruningModifier,dict(fisher_block_size=4)), (MFACPruningModifier,dict(fisher_block_size=None)), (MFACPruningModifier,dict(fisher_block_size=5))])
@pytest.mark.parametrize('end', [.5,1])
def test_an_update_by_brute_force(cls, kwargs, end):
    "Of 8 steps, the last 3 before the update count, that of the update's own batch included"
    grads,weight = torch.randn(8,2,6),torch.randn(2,6)
    learn = cut_linear(cls(.5, .5, start_epoch=end, end_epoch=end, update_frequency=1, num_grads=3, damp=.01, **kwargs), grads, weight)
    used = grads[2:5] if end==.5 else grads[5:]
    fisher = dense_fisher(used.flatten(1).double(), .01, kwargs['fisher_block_size'] or 12)
    scores = weight.flatten().double()**2/(2*fisher.inverse().diag())
    cut = torch.zeros(12, dtype=torch.bool).index_fill(0, scores.argsort()[:6], True)
    change,_ = cheapest(fisher, weight.flatten().double(), cut)
    assert learn.model.weight_mask.flatten().equal(~cut)
    torch.testing.assert_close(learn.model.weight.detach().flatten().double(), weight.flatten()+change, rtol=1e-4, atol=1e-6)
    assert learn.model.weight.detach().flatten()[cut].count_nonzero()==0

@pytest.mark.parametrize('cls', [OBSPruningModifier,MFACPruningModifier])
def test_what_was_cut_before_stays_out_of_it(cls):
    "Gradients behind the mask change nothing, and compensation leaves the mask alone"
    def _run(spoil):
        grads,weight,mask = torch.randn(6,1,8, generator=seeded(0)),torch.randn(1,8, generator=seeded(1)),tensor([[1,0,1,1,1,0,1,1]]).bool()
        model = nn.Linear(8,1,bias=False)
        model.weight.data[:] = weight*mask
        masks_from_zeros(model)
        batch = torch.zeros(1,8),torch.zeros(1,1)
        learn = tiny_learner(model, dls=DataLoaders([batch]*6, [batch]), opt_func=SGD, lr=0.)
        learn.fit(1, cbs=[cls(.5, .5, start_epoch=.5, end_epoch=.5, update_frequency=1), Given(grads+spoil*~mask)])
        assert not (model.weight_mask & ~mask).any() and violations(model)==[]
        return model.weight.detach()
    assert _run(0.).equal(_run(7.))

def correlated(n=400, d=12):
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(n, 3, generator=g)
    x = torch.cat([shared[:,i%3,None]+.3*torch.randn(n, 1, generator=g) for i in range(d)], 1)
    w = 1+torch.rand(d, 1, generator=g)
    return x,x@w+.01*torch.randn(n, 1, generator=g),w

@pytest.mark.parametrize('share', [.25,.5,.75])
def test_better_than_magnitude_on_correlated_inputs(share):
    "Least squares, cut at once at the optimum, with gradients of single samples"
    x,y,w = correlated()
    errors = {}
    for name,modifier in dict(magnitude=MagnitudePruningModifier(share, share, 1, 1, 1), obs=OBSPruningModifier(share, share, 1, 1, 1, fisher_block_size=12),
                              anew=OBSPruningModifier(share, share, 1, 1, 1, fisher_block_size=12, num_recomputations=9), mfac=MFACPruningModifier(share, share, 1, 1, 1, num_grads=400)).items():
        residual = x@w-y
        model = cut_linear(modifier, (x*residual)[:,None], w.T).model
        errors[name] = (x@model.weight.detach().T-y).square().mean().item()
        assert int((model.weight==0).sum())==round(12*share)
    assert max(errors['obs'],errors['mfac'])<(.25 if share<.75 else .75)*errors['magnitude'], errors  # single scores don't see that only one of several may go
    assert errors['anew']<.25*errors['magnitude'] and errors['anew']<=1.01*errors['obs'], errors

def test_recomputations_cut_one_after_the_other():
    "In as many steps as weights, each is the cheapest of those that are left"
    grads,weight = torch.randn(9,1,8),torch.randn(1,8)
    found = cut_linear(OBSPruningModifier(.5, .5, 1, 1, 1, damp=.01, num_grads=9, num_recomputations=4), grads, weight).model.weight.detach()[0]
    fisher,w,left = dense_fisher(grads[:,0].double(), .01, 8),weight[0].double(),torch.ones(8, dtype=torch.bool)
    for _ in range(4):
        i = left.nonzero()[:,0]
        inverse = fisher[i][:,i].inverse()
        j = (w[i]**2/inverse.diag()).argmin()
        w[i] -= w[i][j]*inverse[:,j]/inverse[j,j]
        left[i[j]] = False
        w[~left] = 0
    assert found.ne(0).equal(left)
    torch.testing.assert_close(found.double(), w, rtol=1e-4, atol=1e-5)

def test_movement_by_hand():
    grads,weight = torch.randn(8,2,6),torch.randn(2,6)
    modifier = MovementPruningModifier(.5, .75, start_epoch=.5, end_epoch=1.5, update_frequency=.5)
    learn = cut_linear(modifier, grads, weight, lr=.1)
    w,score = weight.clone(),torch.zeros(2,6)
    for i,g in enumerate(grads):
        score -= .01*g*w
        if i==4: mask = torch.ones(12, dtype=torch.bool).index_fill(0, score.flatten().argsort()[:6], False).view(2,6)
        if i>=4: g,score,w = g*mask,score*mask,w*mask
        w -= .1*g
    order = score.masked_fill(~mask, -math.inf).flatten().argsort()
    n = round(12*modifier.sparsity_at(1., .5, .75))
    assert learn.model.weight_mask.flatten().equal(torch.ones(12, dtype=torch.bool).index_fill(0, order[:n], False)) and n==9
    torch.testing.assert_close(learn.model.weight.detach(), w*learn.model.weight_mask)

# when gradients are gathered, and how long they are kept

def gathered(cbs, modifier, epochs=3, **kwargs):
    "After each batch: how many gradients are held"
    held = Note('after_batch', lambda cb: max(modifier._n_grads.values(), default=0))
    learn = tiny_learner(n_trn=8, **kwargs)
    learn.fit(epochs, cbs=[modifier, held, *cbs])
    return held.notes

@pytest.mark.parametrize('cls', [OBSPruningModifier,MFACPruningModifier])
def test_only_the_steps_before_an_update_are_gathered(cls):
    assert gathered([], cls(.05, .8, 1, 2.5, 1, num_grads=3))==[0]*6+[1,2]+[0]*6+[1,2]+[0,0,1,2]+[0]*4
    assert gathered([], cls(.05, .8, 1, 3, 1, num_grads=3))==[0]*6+[1,2]+[0]*6+[1,2]+[0]*5+[1,2,3]  # the last at the very end

def test_accumulated_steps_are_gathered():
    "16 batches before the update, 8 steps, of which the last 3 count"
    seen,modifier = [],OBSPruningModifier(.05, .8, 2, 2, 1, num_grads=3)
    modifier.forget_gradients = lambda f=modifier.forget_gradients: (seen.append(dict(modifier._n_grads)) if hasattr(modifier, '_n_grads') else None, f())
    tiny_learner(n_trn=8).fit(3, cbs=[modifier, GradientAccumulation(16)])
    assert seen[-1]=={n:3 for n in ('0.weight','2.weight','4.weight')}

def test_too_few_gradients_are_told_once(caplog):
    caplog.set_level('INFO', 'fastsparse_create')
    tiny_learner(n_trn=8).fit(2, cbs=OBSPruningModifier(.05, .8, 0, 2, .5))
    assert caplog.text.count('has 1 gradients')==1 and 'not 1024' in caplog.text

def test_number_of_gradients_by_sparsity():
    m = MFACPruningModifier(0., .8, 0, 4, 1, num_grads={0.:2, .5:5, .75:7})
    seen = []
    def _note(cb): seen.append((round(cb.learn.epoch+cb.learn.iter/8, 2),m._n_grads['2.weight'],len(m._grads['2.weight'])))
    m.forget_gradients = lambda f=m.forget_gradients: (getattr(m, '_grads', None) and _note(m), f())
    tiny_learner(n_trn=8).fit(4, cbs=m)
    assert [n for _,_,n in seen]==[1,2,5,7,7]  # for a sparsity of 0, .46, .7, .79 and .8

@pytest.mark.parametrize('make', [movement,obs,mfac])
def test_nothing_is_kept_after_the_last_update(make):
    m,learn = make(0, 1, .5),tiny_learner(opt_func=Adam)
    learn.fit(2, cbs=m)
    assert not getattr(m, '_scores', None) and not getattr(m, '_grads', None) and not getattr(m, '_sums', None)
    assert all(set(learn.opt.state[p.param])<={'grad_avg','sqr_avg','step'} for p in masked_params(learn.model))

# as any pruner

methods = dict(movement=movement, obs=obs, obs_local=partial(obs, global_sparsity=False, num_recomputations=3), mfac=mfac, mfac_global=partial(mfac, global_sparsity=True, fisher_block_size=None))
surroundings = dict(alone=lambda: [], accumulation=lambda: [GradientAccumulation(16)], clip=lambda: [GradientClip(.05)], overflow=lambda: [Overflow(2,3,8,9,23)],
                    half=lambda: [MixedPrecision()], all=lambda: [MixedPrecision(), GradientAccumulation(24), GradientClip(.05), Stranger()])

def expected_zeros(model, s, is_global):
    numels = {p.name:p.mask.numel() for p in masked_params(model)}
    return round(sum(numels.values())*s) if is_global else {n:round(k*s) for n,k in numels.items()}

def grid():
    "Each method with each optimizer in two of the surroundings"
    for i,m in enumerate(methods):
        for j,o in enumerate(optimizers):
            for k in (0,1): yield m,list(surroundings)[(2*i+j+3*k)%6],o

@pytest.mark.parametrize('method,around,opt', grid())
def test_invariants_and_exact_counts(method, around, opt):
    learn,witness,m = tiny_learner(n_trn=8, opt_func=optimizers[opt], lr=.01),Witness(),methods[method](.25, 3, .5)
    rising = Note('after_batch', lambda cb: n_masked(cb.model))
    learn.fit(3, cbs=[m, witness, rising, *surroundings[around]()])
    assert witness.seen==[] and violations(learn.model, learn.opt)==[] and rising.notes==sorted(rising.notes)
    found = zeros(learn.model)
    assert (sum(found.values()) if m.global_sparsity else found)==expected_zeros(learn.model, .8, m.global_sparsity)

@pytest.mark.parametrize('method', methods)
def test_sparsity_follows_the_schedule(method):
    m = methods[method](0, 3, .5)
    seen = Note('after_batch', lambda cb: n_masked(cb.model))
    learn = tiny_learner(n_trn=8)
    learn.fit(3, cbs=[m, seen])
    for i,n in enumerate(seen.notes):
        wanted = expected_zeros(learn.model, m.sparsity_at(i//4*.5, .05, .8), m.global_sparsity)
        assert n==(wanted if m.global_sparsity else sum(wanted.values())), i

@pytest.mark.parametrize('method', methods)
def test_overflow_leaves_the_update_due(method):
    "The first update comes a batch late"
    seen = Note('after_batch', lambda cb: n_masked(cb.model))
    tiny_learner(n_trn=8).fit(2, cbs=[methods[method](.5, 1.5, 1), Overflow(4,5), seen])
    assert seen.notes[:6]==[0]*6 and seen.notes[6]>0

@pytest.mark.parametrize('method', methods)
def test_overflow_at_the_end(method):
    learn = tiny_learner(n_trn=8)
    learn.fit(2, cbs=[methods[method](.5, 1.875, .5), Overflow(15)])
    assert abs(measured_sparsity(learn.model)-.8)<.01

@pytest.mark.parametrize('mask_type,check', [('block4', None), ([2,2], None), ('2:4', lambda m: is_nm(m, 2, 4)), ('m4n2_2d_best', None)])
@pytest.mark.parametrize('method', ['movement','obs_local','mfac'])
def test_patterns(method, mask_type, check):
    s = .5
    m = {'movement':MovementPruningModifier, 'obs_local':partial(OBSPruningModifier, global_sparsity=False), 'mfac':MFACPruningModifier}[method](0., s, 0, 2, .5, ['re:(0|2)'], mask_type=mask_type)
    learn,witness = tiny_learner(mlp(), n_trn=8),Witness()
    learn.fit(2, cbs=[m, witness])
    assert witness.seen==[] and zeros(learn.model)=={'0.weight':32, '2.weight':128}
    for p in masked_params(learn.model):
        if check: assert check(p.mask)
        if isinstance(m.calculator, Block): assert m.calculator.pool(p.mask.float()).unique().tolist()==[0,1]

@pytest.mark.parametrize('mask_type', ['unstructured','block4'])
@pytest.mark.parametrize('method', ['movement','obs','mfac'])
def test_convolutions(method, mask_type):
    "Three input channels are an incomplete tile; transposed convolutions have inputs first"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.ConvTranspose2d(8,6,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,2))
    learn,witness = tiny_learner(model, shape=(3,8,8)),Witness()
    learn.fit(3, cbs=[{'movement':MovementPruningModifier, 'obs':OBSPruningModifier, 'mfac':MFACPruningModifier}[method](0., .5, 0, 3, .5, mask_type=mask_type), witness])
    assert witness.seen==[] and abs(measured_sparsity(learn.model)-.5)<.02

def test_filters_by_movement():
    learn = tiny_learner(n_trn=8)
    learn.fit(2, cbs=MovementPruningModifier(0., .5, 0, 2, .5, ['2.weight'], mask_type='filter'))
    assert (learn.model[2].weight!=0).any(1).sum()==8

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('dtype', [torch.float64,torch.bfloat16])
def test_dtypes(method, dtype):
    learn = tiny_learner(mlp().to(dtype), n_trn=8, dtype=dtype)
    learn.fit(2, cbs=methods[method](0, 2, .5))
    assert abs(measured_sparsity(learn.model)-.8)<.01 and violations(learn.model, learn.opt)==[]

@pytest.mark.parametrize('method', methods)
def test_frozen_layers_are_cut_by_magnitude(method):
    "Nothing is known about them, and least of all that they are worth nothing"
    learn = tiny_learner(n_trn=8, splitter=halves)
    before = learn.model[0].weight.detach().clone()
    learn.freeze()
    m = methods[method](0, 1, .5)
    learn.fit(1, cbs=m)
    kept = learn.model[0].weight.detach()!=0
    assert (~kept).sum()==round(.8*64) and before.abs()[kept].min()>=before.abs()[~kept].max() and learn.model[0].weight.detach()[kept].equal(before[kept])
    assert abs(measured_sparsity(learn.model)-.8)<.01

@pytest.mark.parametrize('method', methods)
def test_fine_tuning_is_one_schedule(method):
    learn,witness,m = tiny_learner(n_trn=8, splitter=halves),Witness(),methods[method](0, 3, .5)
    learn.fine_tune(3, freeze_epochs=1, cbs=[m, witness])
    assert witness.seen==[] and abs(measured_sparsity(learn.model)-.8)<.01

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('parts', [(1,1,2),(3,1)])
def test_split_fits_are_one(method, parts):
    def _run(*epochs):
        learn,m = tiny_learner(n_trn=8, opt_func=Adam, lr=.01),methods[method](.5, 3.5, 1)  # an update on the end of a fit has to do without a batch
        for n in epochs: learn.fit(n, cbs=m)
        return weights(learn.model)
    assert same(_run(4), _run(*parts))

@pytest.mark.parametrize('method', methods)
def test_nothing_happens_outside_of_training(method):
    learn,m = tiny_learner(n_trn=8, opt_func=Adam),methods[method](1, 3, .5)
    learn.fit(2, cbs=m)
    before,masks_before,noted = weights(learn.model),masks(learn.model),{k:repr(v) for k,v in vars(m).items() if k.startswith('_') and k!='_plan'}
    learn.add_cb(m)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=12, show_plot=False)
    learn.remove_cb(m)
    assert same(before, weights(learn.model)) and same(masks_before, masks(learn.model))
    assert noted=={k:repr(v) for k,v in vars(m).items() if k in noted}
    learn.fit(1, cbs=m)
    assert abs(measured_sparsity(learn.model)-.8)<.01

@pytest.mark.parametrize('method', methods)
def test_release(method):
    learn = tiny_learner(n_trn=8)
    learn.fit(3, cbs=methods[method](0, 2, .5, leave_enabled=False))
    assert measured_sparsity(learn.model)<.5 and abs(1-sum(p.mask.sum().item() for p in masked_params(learn.model))/sum(p.mask.numel() for p in masked_params(learn.model))-.8)<.01

def test_random_generators_are_left_alone():
    def _state(cbs):
        tiny_learner(n_trn=8).fit(1, cbs=cbs)
        return torch.get_rng_state()
    for make in methods.values(): assert _state(make(0, 1, .5)).equal(_state([]))

@pytest.mark.parametrize('method', ['movement','obs','mfac'])
def test_nan_is_an_error(method):
    learn = tiny_learner(n_trn=8)
    learn.create_opt()
    learn.model[2].weight.data[0,0] = math.nan
    with pytest.raises(ValueError, match=r'\.weight: .*hold.* NaN.*ranked'): learn.fit(1, cbs=methods[method](0, 1, .5))

# resuming a fit

@pytest.mark.parametrize('opt_func', [optimizers[n] for n in ('sgd','adam','torch_sgd','torch_adamw')] + [wrapped_plain := partial(OptimWrapper, opt=torch.optim.SGD)], ids=['sgd','adam','torch_sgd','torch_adamw','no momentum'])
@pytest.mark.parametrize('name', ['movement','movement_late','obs','mfac'])
def test_resumed_fit_is_uninterrupted(name, opt_func, tmp_path):
    "Scores of movement are saved with the optimizer; gradients of an epoch that is over are not, so that the windows lie within epochs"
    make = dict(movement=lambda: movement(.25, 3.5, .5), movement_late=lambda: movement(2.5, 3.5, .5), obs=lambda: obs(.5, 3.5, 1), mfac=lambda: mfac(.5, 3.5, 1))[name]
    def _learner(): return tiny_learner(n_trn=8, path=tmp_path, opt_func=opt_func, lr=.01)
    whole = _learner()
    whole.fit(4, cbs=[make(), SaveModelCallback(every_epoch=True, with_opt=True, fname='epoch')])
    for epoch in (1,2,3):
        learn = _learner()
        masks_from_file(learn.model, tmp_path/f'models/epoch_{epoch-1}.pth')
        learn.load(f'epoch_{epoch-1}')
        learn.fit(4, cbs=make(), start_epoch=epoch)
        assert same(weights(whole.model), weights(learn.model)) and same(masks(whole.model), masks(learn.model)), epoch

# in a plain loop

cases = dict(movement=lambda: [movement(.5, 3., .25)], movement_every=lambda: [movement(0., 4., -1)], movement_released=lambda: [movement(0., 2., .5, leave_enabled=False)],
             obs=lambda: [obs(.5, 3., .75)], obs_every=lambda: [obs(0., 4., -1)], obs_many=lambda: [OBSPruningModifier(.05, .8, 0., 4., 2., num_grads=20, num_recomputations=2)],
             obs_nm=lambda: [OBSPruningModifier(0., .5, 0., 3., .5, ['2.weight'], mask_type='2:4', global_sparsity=False, num_grads=3)],
             mfac=lambda: [mfac(.5, 3., .75)], mfac_end=lambda: [mfac(0., 4., 1.5, num_grads={0.:2, .7:6})], clip=lambda: [obs(.5, 3., .75), GradientClip(.05)],
             from_param=lambda: [MFACPruningModifier('__FROM_PARAM__', .8, 1., 3., 1.)],
             both=lambda: [movement(0., 2., .5, ['0.weight']), obs(.5, 3., .5, ['2.weight','4.weight'])])

@pytest.mark.parametrize('opt_func', [sgd,adam], ids=['sgd','adam'])
@pytest.mark.parametrize('name', cases)
def test_loop_equals_fit(name, opt_func): assert_equal_epochs(by_fit(opt_func, cases[name]), by_loop(opt_func, cases[name]))

@pytest.mark.parametrize('name', ['movement','obs','obs_many','mfac_end'])
def test_loop_with_scaler(name):
    assert_equal_epochs(by_fit(sgd, cases[name]), by_loop(sgd, cases[name], scaler=torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=5)))

@pytest.mark.parametrize('name', ['movement','obs','obs_many','mfac_end'])
def test_overflows_are_no_steps(name): assert_skips_overflows(sgd, cases[name])

@pytest.mark.parametrize('name', ['movement','obs','obs_many','mfac_end'])
def test_accumulation(name):
    class Accumulate(GradientAccumulation):
        def after_loss(self): self.learn.loss_grad = self.learn.loss_grad/2
    class DL(list): bs = 8
    cbs = {'movement':lambda: [movement(.5, 3., .5)], 'obs':lambda: [obs(.5, 3., .5)]}.get(name, cases[name])
    assert_equal_epochs(by_fit(sgd, cbs, data=DL(batches()), extra=[trusted(Accumulate)(16)]), by_loop(sgd, cbs, n_acc=2))

@pytest.mark.parametrize('at,first', [(1,'model'), (8,'manager'), (13,'manager'), (16,'model'), (21,'model'), (30,'manager')])
@pytest.mark.parametrize('name', [n for n in cases if n!='clip'])
def test_resumed_loop(name, at, first): assert_resumes(cases[name], at, first, noop)

def test_steps_without_gradients():
    for make in methods.values():
        model,opt,manager = managed(sgd, lambda: [make(0., 3., .5)])
        for _ in range(n_iter*n_epoch+1): opt.step()
        assert abs(measured_sparsity(model)-.8)<.01

# arguments

schedule = dict(init_sparsity=.05, final_sparsity=.8, start_epoch=0, end_epoch=3, update_frequency=.5)

@pytest.mark.parametrize('cls,kwargs,error,message', [
    (MovementPruningModifier, dict(global_sparsity=True), ValueError, 'global_sparsity must be false'),
    (MovementPruningModifier, dict(end_epoch=-1), ValueError, 'end_epoch must be given'),
    (MovementPruningModifier, dict(inter_func='cubical'), ValueError, "did you mean 'cubic'"),
    (OBSPruningModifier, dict(mask_type='filter'), ValueError, "mask_type 'filter' is not supported.*block4"),
    (MFACPruningModifier, dict(mask_type='channel'), ValueError, "mask_type 'channel' is not supported"),
    (OBSPruningModifier, dict(mask_type='2:4', final_sparsity=.5), ValueError, 'global_sparsity false'),
    (OBSPruningModifier, dict(damp=0), ValueError, 'damp must be above 0, got 0'), (OBSPruningModifier, dict(damp='1'), TypeError, "damp must be a number, got '1'"),
    (OBSPruningModifier, dict(num_grads=0), ValueError, 'num_grads must be at least 1, got 0'), (OBSPruningModifier, dict(num_grads=1.5), ValueError, 'num_grads must be a whole number, got 1.5'),
    (OBSPruningModifier, dict(fisher_block_size=0), ValueError, 'fisher_block_size must be at least 1'), (OBSPruningModifier, dict(num_recomputations=0), ValueError, 'num_recomputations must be at least 1'),
    (OBSPruningModifier, dict(global_sparsity='yes'), TypeError, "global_sparsity must be True or False, got 'yes'"),
    (OBSPruningModifier, dict(fisher_block_size=None), TypeError, 'fisher_block_size must be a number'), (MFACPruningModifier, dict(fisher_block_size=-1), ValueError, 'fisher_block_size must be at least 0'),
    (MFACPruningModifier, dict(num_grads={.5:3}), ValueError, 'from sparsity 0.0 on'), (MFACPruningModifier, dict(num_grads={0.:0}), ValueError, 'num_grads must be at least 1, got 0'),
    (MFACPruningModifier, dict(num_grads='64'), TypeError, "num_grads must be a number, got '64'"), (MFACPruningModifier, dict(grads_device='gpu'), ValueError, "grads_device must be a device"),
])
def test_arguments(cls, kwargs, error, message):
    with pytest.raises(error, match=f'{cls.__name__}: .*{message}'): cls(**{**schedule, **kwargs})

@pytest.mark.parametrize('modifier', [MovementPruningModifier(**schedule), OBSPruningModifier(**schedule, num_grads=64, mask_type='block4', grad_sampler_kwargs={}), MFACPruningModifier(**schedule, num_grads={0.:4, .5:8}, fisher_block_size=None)])
def test_survives_text(modifier):
    from fastsparse_create.recipe.compile import Recipe
    again = Recipe.from_string(str(Recipe.from_modifiers(modifier))).compile()[0]
    assert again.args()==modifier.args()

# accuracy

@pytest.mark.slow
@pytest.mark.parametrize('cls', [MovementPruningModifier,OBSPruningModifier,MFACPruningModifier])
def test_digits_within_two_points_of_magnitude(cls):
    "Mean of three seeds, 80 % sparse"
    from sklearn.datasets import load_digits
    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(42))
    x,y = torch.tensor(digits.data/16).float()[order],torch.tensor(digits.target)[order]
    def _accuracy(cls, seed):
        set_seed(seed)
        dls = DataLoaders(DataLoader(Tensors(x[:1437], y[:1437]), bs=64, shuffle=True), DataLoader(Tensors(x[1437:], y[1437:]), bs=360))
        learn = tiny_learner(nn.Sequential(nn.Linear(64,100), nn.ReLU(), nn.Linear(100,100), nn.ReLU(), nn.Linear(100,10)), dls=dls, metrics=accuracy)
        learn.loss_func = CrossEntropyLossFlat()
        learn.fit_one_cycle(20, .1, cbs=cls(.05, .8, 0, 15, .5))
        return learn.recorder.values[-1][2]
    means = [sum(_accuracy(c, seed) for seed in range(3))/3 for c in (MagnitudePruningModifier,cls)]
    assert means[1]>means[0]-.02, means
