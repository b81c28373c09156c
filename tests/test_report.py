"Reports: zeros, and FLOPs against numbers worked out by hand"
import random
from copy import deepcopy
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np,pytest,torch
from torch import nn
from fastai.basics import Callback,DataLoader,DataLoaders,Learner,MSELossFlat,set_seed
from fastai.test_utils import synth_learner
from fastai.text.models.awdlstm import AWD_LSTM
from fastsparse_create.callback.learning_rate import *
from fastsparse_create.callback.pruning import *
from fastsparse_create.callback.training import *
from fastsparse_create.masking import *
from fastsparse_create.masks.core import get_mask_type
from fastsparse_create.plots import *
from fastsparse_create.recipe.compile import Recipe
from fastsparse_create.report import *

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def cut(model, name, share=.5):
    p, = attach_masks(model, name)
    set_mask(p, get_mask_type('unstructured')(p.param.abs(), share))
    return model

layers = {  # module, shape of the batch, multiply-adds
    'linear':            (nn.Linear(8,4), (1,8), 32),
    'linear tokens':     (nn.Linear(8,4), (2,3,5,8), 30*32),
    'conv1d':            (nn.Conv1d(3,6,5), (1,3,20), 6*3*5*16),
    'conv2d':            (nn.Conv2d(3,16,3,stride=2,padding=1), (2,3,8,8), 16*3*9*4*4*2),
    'conv3d':            (nn.Conv3d(2,4,3), (1,2,5,5,5), 4*2*27*27),
    'unbatched conv':    (nn.Conv2d(3,16,3), (3,8,8), 16*3*9*36),
    'depthwise':         (nn.Conv2d(8,8,3,padding=1,groups=8), (1,8,10,10), 8*9*100),
    'grouped':           (nn.Conv2d(8,4,1,groups=2), (1,8,10,10), 4*4*100),
    'transposed':        (nn.ConvTranspose2d(4,6,2,stride=2), (1,4,5,5), 4*6*4*25),
    'grouped transposed':(nn.ConvTranspose1d(4,6,3,groups=2), (1,4,7), 4*3*3*7),
    'lstm':              (nn.LSTM(5,7,num_layers=2,bidirectional=True,batch_first=True), (3,4,5), 12*2*4*7*(5+7+14+7)),
    'lstm projection':   (nn.LSTM(5,7,proj_size=2), (4,3,5), 12*(4*7*(5+2)+2*7)),
    'gru':               (nn.GRU(5,7), (4,5), 4*3*7*(5+7)),
    'rnn cell':          (nn.GRUCell(5,7), (3,5), 3*3*7*(5+7)),
}

@pytest.mark.parametrize('case', layers)
def test_flops_by_hand(case):
    layer,shape,macs = layers[case]
    model = deepcopy(layer)
    assert sparsity_report(model, torch.randn(shape)).model.flops==2*macs
    assert sparsity_report(model, shape).prunable.flops==2*macs

@pytest.mark.parametrize('case', layers)
def test_sparse_flops_are_dense_flops_times_density(case):
    layer,shape,_ = layers[case]
    model = deepcopy(layer)
    for p in attach_masks(model): set_mask(p, torch.rand_like(p.param)<.5)
    for r in sparsity_report(model, shape).rows: assert r.sparse_flops*r.parameters==r.flops*(r.parameters-r.zeros)

class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)
    def forward(self, q, k, v): return self.attn(key=k, query=q, value=v)[0]

def test_attention_counts_queries_and_keys():
    q,k = torch.randn(2,5,8),torch.randn(2,3,8)
    report = sparsity_report(Attention(), (q,k,k))
    assert [r.flops for r in report.rows]==[2*64*(10+6+6), 2*64*10]
    assert [r.layer for r in report.rows]==['attn.in_proj_weight','attn.out_proj.weight']

def test_attention_of_other_dimensions():
    report = sparsity_report(Attention(kdim=4, vdim=6), (torch.randn(1,5,8),torch.randn(1,3,4),torch.randn(1,3,6)))
    assert [r.flops for r in report.rows]==[2*64*5, 2*8*4*3, 2*8*6*3, 2*64*5]

def test_attention_density_of_each_projection():
    model = Attention()
    p, = attach_masks(model, 'attn.in_proj_weight')
    set_mask(p, torch.arange(24)[:,None].expand(24,8)>=8)  # no query passes
    report = sparsity_report(model, (torch.randn(1,5,8),*[torch.randn(1,3,8)]*2))
    assert (report.rows[0].flops,report.rows[0].sparse_flops)==(2*64*(5+3+3), 2*64*(3+3))

@pytest.mark.parametrize('masked', [False, True])
def test_transformer_counts_the_same_with_padding_and_masks(masked):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    if masked: attach_masks(model)
    report = sparsity_report(model, (torch.randn(2,5,8),None,torch.tensor([[0,0,0,0,0],[0,0,0,1,1]]).bool()))
    assert report.model.flops==2*2*10*(4*64+2*8*16)
    assert torch.backends.mha.get_fastpath_enabled()

def test_packed_sequences_count_their_tokens():
    packed = nn.utils.rnn.pack_sequence([torch.randn(4,5), torch.randn(2,5)])
    assert sparsity_report(nn.LSTM(5,7), (packed,)).model.flops==2*6*4*7*(5+7)

def test_awd_lstm():
    report = sparsity_report(AWD_LSTM(20, 6, 9, 2), torch.randint(20, (2,5)))
    assert [r.flops for r in report.rows]==[2*10*36*9, 2*10*36*6, 2*10*24*6, 2*10*24*9]
    assert {r.type for r in report.rows}=={'LSTM','WeightDropout'}

@pytest.mark.parametrize('arch,gmacs', [('resnet18',1.814), ('mobilenet_v2',.301), ('vit_b_16',16.87)])
def test_known_models(arch, gmacs):
    import torchvision.models
    with torch.device('meta'): model = getattr(torchvision.models, arch)()
    model = model.to_empty(device='cpu')
    for p in model.parameters(): nn.init.ones_(p)
    assert sparsity_report(model, (1,3,224,224)).model.flops/2e9==pytest.approx(gmacs, rel=.005)

def test_timm_model():
    timm = pytest.importorskip('timm')
    report = sparsity_report(timm.create_model('convnext_atto', num_classes=10), (1,3,64,64))
    assert report.model.flops==report.prunable.flops
    assert not [r for r in report.rows if r.flops is None]

class Reuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.idle = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,4)
        self.b.weight = self.a.weight
    def forward(self, x): return self.a(self.a(self.b(x)))

def test_reused_and_tied_weights():
    report = sparsity_report(Reuse(), (1,4))
    assert [(r.layer,r.parameters,r.flops) for r in report.rows]==[('a.weight',16,2*3*16), ('idle.weight',16,None)]
    assert report.prunable.parameters==32 and report.prunable.flops==2*3*16
    assert report.model.parameters==16+4+4+16+4

def test_masked_embedding_is_listed():
    model = cut(nn.Sequential(nn.Embedding(10,4), nn.Linear(4,2)), '0.weight')
    report = sparsity_report(model, torch.randint(10, (1,3)))
    assert [(r.layer,r.sparsity,r.flops) for r in report.rows]==[('0.weight',.5,None), ('1.weight',0.,2*3*8)]

def test_zeros_are_measured_not_read_off_masks():
    model = cut(nn.Sequential(nn.Linear(8,4), nn.Linear(4,2)), '0.weight', .75)
    before = sparsity_report(model)
    make_permanent(model)
    assert [r.zeros for r in sparsity_report(model).rows]==[r.zeros for r in before.rows]==[24,0]

def full_state(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [m.training for m in model.modules()],hooks,{k:v.clone() for k,v in model.state_dict().items()}

def test_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.Dropout(.5), nn.Flatten(), nn.Linear(36,2)).train()
    model[1].eval()
    cut(model, '0.weight')
    modes,hooks,state = full_state(model)
    rng,numpy_rng,torch_rng = random.getstate(),np.random.get_state()[1],torch.get_rng_state()
    sparsity_report(model, torch.ones(2,1,5,5))
    modes2,hooks2,state2 = full_state(model)
    assert modes==modes2 and hooks==hooks2 and all(torch.equal(v, state2[k]) for k,v in state.items())
    assert random.getstate()==rng and (np.random.get_state()[1]==numpy_rng).all() and torch.equal(torch.get_rng_state(), torch_rng)
    assert all(p.grad is None for p in model.parameters())

def test_failing_batch_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4,2), nn.Dropout()).train()
    modes,hooks,_ = full_state(model)
    with pytest.raises(RuntimeError): sparsity_report(model, (1,5))
    assert full_state(model)[:2]==(modes,hooks) and torch.is_grad_enabled()

def batches(learn): return [b[0] for b in learn.dls.train]

def test_learner_gives_its_own_example_and_keeps_its_order():
    expected = batches(synth_learner_at(3))
    learn = synth_learner_at(3)
    report = sparsity_report(learn)
    assert report.model.flops==2*(1*4+4*1)
    assert all(torch.equal(a, b) for a,b in zip(batches(learn), expected))
    assert learn.model.training

def synth_learner_at(seed):
    set_seed(seed)
    return synth_learner(model=nn.Sequential(nn.Linear(1,4), nn.BatchNorm1d(4), nn.Linear(4,1)))

def test_learner_in_the_midst_of_training():
    class Ask(Callback):
        def after_batch(self): self.learn.reports = getattr(self.learn, 'reports', [])+[sparsity_report(self.learn)]
    asked,silent = synth_learner_at(4),synth_learner_at(4)
    for learn,cbs in ((asked,[Ask()]), (silent,[])):
        with learn.no_bar(), learn.no_logging():
            set_seed(5)
            learn.fit(2, cbs=[GMPruningModifier(0.,.5,0,1,.2), *cbs])
    assert all(torch.equal(a, b) for a,b in zip(asked.model.state_dict().values(), silent.model.state_dict().values()))
    assert asked.reports[-1].prunable.sparsity==.5

def test_learner_with_plain_loaders_and_without_data():
    dl = torch.utils.data.DataLoader([(torch.ones(3),torch.ones(1))]*8, batch_size=4)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(3,1), loss_func=MSELossFlat())
    assert sparsity_report(learn).model.flops==6
    assert sparsity_report(learn, (5,3)).model.flops==30
    empty = synth_learner(model=nn.Linear(1,1))
    empty.dls = DataLoaders(DataLoader([], bs=1), DataLoader([], bs=1))
    assert sparsity_report(empty).model.flops is None

def test_compiled_and_parallel_models_are_looked_into():
    model = nn.Sequential(nn.Linear(8,4))
    assert sparsity_report(nn.DataParallel(model), (1,8)).rows[0].layer=='0.weight'
    assert sparsity_report(torch.compile(model), (1,8)).rows[0].flops==64

def test_half_precision_shapes():
    assert sparsity_report(nn.Linear(8,4).bfloat16(), (1,8)).model.flops==64

def test_nothing_prunable():
    for model,n in ((nn.Sequential(), 0), (nn.LayerNorm(3), 6)):
        report = sparsity_report(model, (1,3))
        assert report.rows==[] and report.prunable.sparsity==0. and report.model.parameters==n
        assert f"Nothing prunable and no masks among the model's {n} parameters" in repr(report) and repr(report)[:20] in report.to_html()
        assert list(report.to_df().columns)[:2]==['layer','type']
        plot_sparsity_by_layer(model)

def test_text_html_and_frame_agree():
    model = cut(nn.Sequential(nn.Linear(64,32), nn.Linear(32,4)), '0.weight', .75)
    report = sparsity_report(model, (1,64))
    df = report.to_df()
    assert df.zeros.sum()==report.prunable.zeros and df.flops.sum()==report.prunable.flops and df.sparsity[0]==.75
    for s in ('0.weight','32×64','2,048','1,536','75.00%','4.10 k','1.02 k','whole model'): assert s in repr(report) and s in report.to_html()
    assert report._repr_html_()==report.to_html()
    plain = sparsity_report(model)
    assert 'FLOPs' not in repr(plain) and 'FLOPs' not in plain.to_html() and plain.to_df().flops.isna().all()

def test_html_escapes_names():
    model = nn.Module()
    model.add_module('<b>', nn.Linear(2,2))
    assert '&lt;b&gt;.weight' in sparsity_report(model).to_html() and '<b>.' not in sparsity_report(model).to_html()

def test_wrong_model():
    with pytest.raises(TypeError, match='expected a model or a Learner'): sparsity_report([1])

def line(panel, i=0): return panel.lines[i].get_xdata(),panel.lines[i].get_ydata()

def test_schedule_is_what_training_does():
    learn = synth_learner(model=nn.Sequential(nn.Linear(1,100), nn.Linear(100,1)), lr=.01)
    mods = [GMPruningModifier(.1,.8,1,3,.5), LearningRateFunctionModifier('cosine',.02,.001,0,2), SetLearningRateModifier(.005,start_epoch=3)]
    n_iter = len(learn.dls.train)
    sparsities,lrs,_ = plot_schedule(mods, 4, n_iter).child_axes
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=mods)
    promised = {round(x*n_iter):y for x,y in zip(*line(sparsities))}
    assert len(promised)==5
    for batch,s in promised.items(): assert learn.recorder.sparsities[batch]==pytest.approx(s, abs=.01)
    for i in range(len(lrs.lines)):
        for x,y in zip(*line(lrs, i)):
            if x*n_iter<3*n_iter or y==.005:
                batch = min(round(x*n_iter), 4*n_iter-1)
                assert learn.recorder.lrs[batch]==pytest.approx(y)

def test_current_rate_is_handed_on():
    lrs,_ = plot_schedule([SetLearningRateModifier(.1), LearningRateModifier('StepLR',dict(gamma=.5,step_size=1.),start_epoch=2,end_epoch=4)], 6).child_axes
    assert [line(lrs, i)[1][0] for i in (0,2)]==[.1,.1] and line(lrs, 3)[1][-1]==.05
    lrs,_ = plot_schedule([LearningRateModifier('ExponentialLR',dict(gamma=.5),end_epoch=2)], lr=.3).child_axes
    assert line(lrs)[1][0]==.3

def test_rates_of_other_groups_go_on():
    lrs,_ = plot_schedule([SetLearningRateModifier(.1,[0]), SetLearningRateModifier(.2,[1],start_epoch=1)], 4).child_axes
    assert line(lrs, 1)[0][-1]==4

@pytest.mark.parametrize('n_epoch,expected', [(None,8), (5,5), (20,20)])
def test_schedule_epochs(n_epoch, expected):
    ax = plot_schedule([MagnitudePruningModifier('__FROM_PARAM__',.9,1,8,-1), ConstantPruningModifier(start_epoch=7.5), EpochRangeModifier(0,3)], n_epoch)
    assert ax.child_axes[-1].get_xlim()==(0,expected)

def test_schedule_of_numpys_numbers():
    found = [plot_schedule([MagnitudePruningModifier(number(.05), number(.9), 1, 8, -1)]).child_axes for number in (float,np.float64)]
    assert [line(axes[0])[1].tolist() for axes in found][0]==[line(axes[0])[1].tolist() for axes in found][1]

def test_schedule_of_a_recipe_and_of_nothing():
    ax = plot_schedule(Recipe.from_string("modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0\n    end_epoch: 3"))
    assert len(ax.child_axes)==1 and ax.child_axes[0].get_xlim()==(0,3)
    with pytest.raises(ValueError, match='no modifiers to draw'): plot_schedule([Callback()])

def test_given_axes_are_used():
    _,axs = plt.subplots(2, 2)
    assert plot_schedule([EpochRangeModifier(0,2)], ax=axs[0,0]) is axs[0,0]
    assert plot_mask(nn.Linear(3,2), 'weight', axs[0,1]) is axs[0,1]
    assert plot_sparsity_by_layer(nn.Linear(3,2), axs[1,0]) is axs[1,0]
    assert len(plt.get_fignums())==1

def test_recorded_sparsity():
    learn = synth_learner(model=nn.Linear(1,8))
    with pytest.raises(ValueError, match='no sparsity was recorded'): learn.recorder.plot_sparsity()
    learn = synth_learner(model=nn.Sequential(nn.Linear(1,8), nn.Linear(8,1)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=GMPruningModifier(0.,.5,0,1,.5))
    loss,sparsities,lrs = learn.recorder.plot_sparsity().child_axes
    assert line(sparsities)[1][-1]==.5 and len(line(lrs)[1])==len(learn.recorder.lrs)==len(line(sparsities)[1])

def image(ax): return ax.images[0].get_array()

def test_mask_picture():
    model = nn.Sequential(nn.Linear(4,3), nn.ConvTranspose2d(2,5,3))
    mask = torch.tensor([[1,0,0,1],[0,0,0,0],[1,1,1,1]]).bool()
    set_mask(attach_masks(model, '0')[0], mask)
    ax = plot_mask(model, '0')
    assert (image(ax)==mask.float().numpy()).all()
    assert ax.get_title()=='0.weight  3×4  50.0% sparse'
    assert image(plot_mask(model, '1')).shape==(5,18)  # outputs are rows
    make_permanent(model)
    assert (image(plot_mask(model, '0.weight'))==mask.float().numpy()).all()

def test_big_mask_is_shown_as_density():
    model = cut(nn.Linear(1000,300), 'weight', .9)
    shown = image(plot_mask(model, 'weight'))
    assert max(shown.shape)<=256 and shown.mean()==pytest.approx(.1, abs=.005)

def test_mask_picture_needs_one_weight():
    model = nn.Sequential(nn.LSTM(3,4), nn.Linear(4,4))
    with pytest.raises(ValueError, match="'0' stands for 2 weights, choose one of 0.weight_ih_l0, 0.weight_hh_l0"): plot_mask(model, '0')
    with pytest.raises(ValueError, match='matches no parameter'): plot_mask(model, '2')
    assert plot_mask(model, '1.bias').get_title().startswith('1.bias  4')

def test_sparsity_by_layer():
    learn = synth_learner(model=cut(nn.Sequential(nn.Linear(1,8), nn.Linear(8,4)), '1.weight'))
    for o in (learn, learn.model):
        ax = plot_sparsity_by_layer(o)
        assert [b.get_width() for b in ax.patches]==[0.,.5]
