"FLOPs of training, against numbers worked out by hand"
from dataclasses import replace
import pytest,torch
from fastai.text.models.awdlstm import AWD_LSTM
from fastsparse_create.callback.dynamic import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.flops import *
from fastsparse_create.report import *
from fastsparse_create.sparse.linear import *
from utils import *

class Looks(Callback):
    "Needs dense gradients once in `n` batches, the last of each `n`"
    order = 1
    def __init__(self, n): self.n,self._seen = n,0
    def before_batch(self): self._seen += self.training
    @property
    def needs_dense_grad(self): return self._seen%self.n==0

def counted(n_epoch=1, cbs=(), **kwargs):
    learn = tiny_learner(cbs=FlopsCounter(), **kwargs)
    learn.fit(n_epoch, cbs=cbs)
    return learn,learn.flops_counter.report()

def half(model, name='2.weight'):
    sparsify_model(model, .5, name)
    return model

def column(report, name): return [getattr(r, name) for r in report.rows]

def test_dense_mlp():
    _,report = counted()
    assert [r.layer for r in report.rows]==['0.weight','2.weight','4.weight']
    assert column(report, 'inference')==column(report, 'sparse_inference')==[2*4*16, 2*16*16, 2*16*2]
    assert column(report, 'training')==column(report, 'sparse_training')==[4*8*3*n for n in (2*4*16, 2*16*16, 2*16*2)]
    assert (report.batches,report.dense_batches)==(4,0)
    assert (report.total.training_ratio,report.total.inference_ratio)==(1,1)

def test_static_layer():
    _,report = counted(model=half(mlp()))
    assert [r.training_ratio for r in report.rows]==[1,.5,1]==[r.inference_ratio for r in report.rows]
    assert report.total.sparse_training==4*8*3*2*(4*16+128+16*2)

def test_conv_net():
    model = convnet()
    sparsify_model(model, .75, ['0','3'])
    _,report = counted(model=model, shape=(3,8,8))
    dense = [2*8*3*9*6*6, 2*8*8*9*4*4, 2*8*2]
    assert column(report, 'inference')==dense
    assert column(report, 'sparse_inference')==[dense[0]//4, dense[1]//4, dense[2]]
    assert column(report, 'sparse_training')==[4*8*3*n for n in column(report, 'sparse_inference')]
    assert [r.shape for r in report.rows]==[(8,3,3,3),(8,8,3,3),(2,8)]

@pytest.mark.parametrize('every', [1,3,7])
def test_rigl(every):
    f_D,f_S,batches = 2*16*16,2*128,(every+1)*4
    _,report = counted(model=half(mlp()), n_trn=batches, cbs=Looks(every+1))
    row = report.rows[1]
    assert row.sparse_training==batches*8*(3*f_S*every+2*f_S+f_D)/(every+1)
    assert row.training==batches*8*3*f_D
    assert (report.batches,report.dense_batches)==(batches,4)
    assert report.rows[0].sparse_training==report.rows[0].training  # a dense layer has no other gradient

def test_snfs():
    _,report = counted(model=half(mlp()), cbs=Looks(1))
    assert report.rows[1].sparse_training==4*8*(2*2*128+2*256)

@pytest.mark.parametrize('kwargs,dense', [({},22), (dict(num_grads=5),5), (dict(every=10, num_grads=4),12)])
def test_snfs_looks_only_before_updates(kwargs, dense):
    dynamic = SNFS(.5, params=['2.weight'], **{'every':30, 'T_end':1., **kwargs})
    _,report = counted(cbs=dynamic, n_trn=31)
    assert (report.batches,report.dense_batches)==(31,dense)

@pytest.mark.parametrize('method', [SET,RigL,SNFS])
def test_dynamic_sparse_training(method):
    asked = Note('before_backward', lambda cb: cb.learn.dynamic_sparse_training.needs_dense_grad)
    dynamic = method(.5, every=3, params=['2.weight'])
    learn,report = counted(2, [dynamic, asked], n_trn=10)
    dense,row = sum(asked.notes),report.rows[1]
    assert report.dense_batches==dense and report.batches==20
    assert row.sparse_training==8*(20*3*2*128+dense*2*128)
    if method is SNFS: assert dense>len(learn.recorder.mask_updates)>0
    if method is RigL: assert dense==len(learn.recorder.mask_updates)>0
    if method is SET: assert dense==0

def test_stored_sparsely_costs_the_same():
    def trained(stored):
        model = half(mlp())
        if stored: sparse_layers_(model, .4, 1, params=['2.weight'])
        return counted(2, [Looks(3)], model=model)[1]
    masked,stored = trained(False),trained(True)
    assert [replace(r, type='') for r in stored.rows]==[replace(r, type='') for r in masked.rows]
    assert stored.rows[1].type=='SparseLinear' and stored.rows[1].training_ratio<.6
    assert (stored.batches,stored.dense_batches)==(masked.batches,masked.dense_batches)

def test_report_of_what_is_stored_sparsely():
    model = half(mlp())
    before = sparsity_report(model, (3,4))
    sparse_layers_(model, .4, 1, params=['2.weight'])
    after = sparsity_report(model, (3,4))
    assert [replace(r, type='') for r in after.rows]==[replace(r, type='') for r in before.rows]
    assert (after.prunable,after.model)==(before.prunable,before.model)

def test_swapped_between_fits():
    learn,one = counted(model=half(mlp()))
    sparse_layers_(learn.model, .4, 1, params=['2.weight'])
    learn.opt = None
    learn.fit(1)
    two = learn.flops_counter.report()
    assert [r.layer for r in two.rows]==[r.layer for r in one.rows]
    assert column(two, 'sparse_training')==[2*n for n in column(one, 'sparse_training')]

def test_epochs_and_fits_add_up():
    learn,one = counted(model=half(mlp()))
    learn.fit(2)
    three = learn.flops_counter.report()
    assert column(three, 'training')==[3*n for n in column(one, 'training')]
    assert column(three, 'sparse_training')==[3*n for n in column(one, 'sparse_training')]
    assert column(three, 'inference')==column(one, 'inference')
    assert three.batches==12

@pytest.mark.parametrize('event', ['after_pred','after_loss','before_step','after_batch'])
def test_reports_in_the_midst_of_training(event):
    reports = Note(event, lambda cb: cb.learn.flops_counter.report().batches if cb.iter else 0)
    _,report = counted(2, [reports], model=half(mlp()))
    ahead = event in ('before_step','after_batch')
    assert [n for n in reports.notes if n]==[n+ahead for n in (1,2,3,5,6,7)]
    assert report.total.sparse_training==2*counted(model=half(mlp()))[1].total.sparse_training

def test_another_model_starts_anew():
    learn,one = counted()
    other = tiny_learner(cbs=learn.flops_counter)
    other.fit(1)
    assert other.flops_counter.report().batches==one.batches

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam])
def test_training_is_the_same_with_and_without(opt_func):
    def trained(*cbs):
        model = nn.Sequential(nn.Linear(4,16), nn.BatchNorm1d(16), nn.Dropout(.5), nn.ReLU(), nn.Linear(16,2))
        learn = sparse_learner(model=model, opt_func=opt_func, cbs=cbs)
        torch.manual_seed(1)
        learn.fit(3, cbs=GMPruningModifier(.6, .9, 0, 2, .25))
        return learn.model.state_dict()
    torch.manual_seed(0)
    plain = trained()
    torch.manual_seed(0)
    assert same(plain, trained(FlopsCounter(), Looks(3)))

def test_gradual_pruning_costs_what_each_batch_costs():
    densities = Note('before_batch', lambda cb: 1-measured_sparsity(cb.model, '2.weight'))
    learn,report = counted(2, [GMPruningModifier(0., .8, 0, 2, .25, params=['2.weight']), densities])
    expected = sum(8*3*2*round(256*d) for d in densities.notes)
    assert report.rows[1].sparse_training==expected<report.rows[1].training
    assert report.rows[1].sparse_inference==2*(256-round(256*.8))  # the last update comes after the last batch

def test_released_masks_are_dense_again():
    learn,_ = counted(model=half(mlp()))
    stop_enforcing(learn.model)
    before = learn.flops_counter.report().rows[1]
    learn.fit(1)
    after = learn.flops_counter.report().rows[1]
    assert after.sparse_training-before.sparse_training==after.training-before.training

def test_frozen_body_costs_its_forward_pass():
    model = half(mlp())
    for p in model[:4].parameters(): p.requires_grad_(False)
    _,report = counted(model=model)
    assert [t/i/32 for t,i in zip(column(report, 'training'), column(report, 'inference'))]==[1,1,3]
    assert report.rows[1].training_ratio==.5

def test_frozen_weight_hands_gradients_on():
    model = half(mlp())
    model[2].weight.requires_grad_(False)
    _,report = counted(model=model, cbs=Looks(1))
    assert [t/i/32 for t,i in zip(column(report, 'training'), column(report, 'inference'))]==[3,2,3]
    assert report.rows[1].sparse_training==report.rows[1].training/2  # no gradient of its own, hence no dense one

def test_unfrozen_in_the_midst_of_a_fit():
    class Unfreeze(Callback):
        def before_epoch(self): params(self.model[:2])[0].requires_grad_(self.epoch==1)
    _,report = counted(2, Unfreeze())
    assert report.rows[0].training==32*2*4*16*(1+3)

def test_shapes_that_change():
    class Grow(Callback):
        order = 5
        def before_batch(self): self.learn.xb = (F.interpolate(self.xb[0], 8+2*self.epoch),)
    _,report = counted(2, Grow(), model=convnet(), shape=(3,8,8))
    assert report.rows[0].training==32*3*2*8*27*(6*6+8*8)

def test_last_batch_is_smaller():
    _,report = counted(dls=DataLoaders(*[DataLoader(Tensors(torch.randn(11,4), torch.randn(11,2)), bs=4, num_workers=0)]*2))
    assert column(report, 'training')==[11*3*n for n in column(report, 'inference')]==[11*3*n for n in (128,512,64)]

def test_accumulated_gradients_count_each_batch():
    _,report = counted(cbs=GradientAccumulation(16))
    assert report.batches==4 and report.rows[0].training==32*3*128

def test_only_training_counts():
    learn,report = counted()
    learn.validate()
    learn.get_preds()
    learn.lr_find(num_it=12, show_plot=False)
    assert learn.flops_counter.report().batches==report.batches

def test_nothing_counted():
    with pytest.raises(ValueError, match='nothing was counted yet'): FlopsCounter().report()

def n_hooks(model): return sum(len(m._forward_hooks) for m in model.modules())

def test_leaves_no_hooks():
    learn,_ = counted()
    assert n_hooks(learn.model)==0

def test_interrupted_in_the_forward_pass():
    class Break(nn.Module):
        def forward(self, x):
            if self.training: raise KeyboardInterrupt
            return x
    learn = tiny_learner(model=nn.Sequential(nn.Linear(4,2), Break()), cbs=FlopsCounter())
    until_interrupted(learn.fit, 1)
    learn.validate()
    assert n_hooks(learn.model)==0

def test_reused_tied_and_computed_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.idle = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,4)
            self.c = nn.utils.parametrizations.weight_norm(nn.Linear(4,2))
            self.b.weight = self.a.weight
        def forward(self, x): return self.c(self.a(self.a(self.b(x))))
    model = Net()
    sparsify_model(model, .5, 'a')
    _,report = counted(model=model)
    assert [(r.layer,r.inference,r.sparse_inference) for r in report.rows]==[('a.weight',2*3*16,3*16), ('computed weights',16,16)]

def test_attention_has_densities_by_row():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn,self.memory = nn.MultiheadAttention(4, 1, batch_first=True),nn.Parameter(torch.randn(3,4))
        def forward(self, x): return self.attn(x[:,None], *[self.memory.expand(len(x),3,4)]*2)[0][:,0,:2]
    model = Net()
    p, = attach_masks(model, 'attn.in_proj_weight')
    set_mask(p, torch.arange(12)[:,None].expand(12,4)>=4)  # no query passes
    _,report = counted(model=model)
    row = next(r for r in report.rows if r.layer=='attn.in_proj_weight')
    assert (row.inference,row.sparse_inference)==(2*16*(1+3+3), 2*16*(3+3))

def test_recurrent_state_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = AWD_LSTM(20, 6, 9, 2),nn.Linear(6,2)
        def forward(self, x): return self.head(self.rnn(x)[:,-1])
    def trained(*cbs):
        set_seed(0)
        x,y = torch.randint(20, (16,5)),torch.randn(16,2)
        learn = tiny_learner(dls=DataLoaders(*[DataLoader(Tensors(x,y), bs=8, num_workers=0)]*2), model=Net(), cbs=cbs)
        learn.fit(2)
        return learn
    plain,learn = trained(),trained(FlopsCounter())
    assert same(weights(plain.model), weights(learn.model))
    report = learn.flops_counter.report()
    assert column(report, 'inference')[:4]==[r.flops for r in sparsity_report(learn.model.rnn, torch.randint(20, (1,5))).rows]

def test_compiled_and_parallel_models():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner
        def forward(self, x): return self._orig_mod(x)
    plain = column(counted(model=half(mlp()))[1], 'sparse_training')
    assert column(counted(model=Wrapped(half(mlp())))[1], 'sparse_training')==plain
    assert column(counted(model=nn.DataParallel(half(mlp())))[1], 'sparse_training')==plain

def test_text_html_and_frame_agree():
    _,report = counted(2, model=half(mlp()), cbs=Looks(2))
    frame,text,html = report.to_df(),repr(report),report.to_html()
    assert frame.training_ratio.tolist()==[r.training_ratio for r in report.rows]
    assert frame[['training','sparse_training','inference','sparse_inference']].sum().tolist()==[getattr(report.total, n) for n in
        ('training','sparse_training','inference','sparse_inference')]
    for o in ['2.weight','16×16','98.30 k',f'{report.rows[1].training_ratio:.3f}×','total','8 batches, 4 of them with dense gradients']: assert o in text and o in html
    assert len(text.splitlines())==1+1+3+1+1+1

def test_counts_beyond_64_bits():
    learn,_ = counted()
    for t in learn.flops_counter._totals.values(): t[0] *= 10**18
    assert learn.flops_counter.report().total.training==32*3*(128+512+64)*10**18

def test_exports_with_the_learner(tmp_path):
    learn,report = counted(path=tmp_path)
    learn.export('l.pkl')
    assert learn.flops_counter.report().total==report.total
