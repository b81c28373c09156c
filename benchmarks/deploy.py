"""Latency of what a model is deployed as: eager PyTorch, ONNX, INT8, and INT8 after channels were removed.

    python benchmarks/deploy.py [--models resnet18 resnet50 encoder] [--batches 1 32] [--threads 1 2] [--levels 0.5 0.8] [--compiled]

`encoder` is the body of a BERT: 4 layers of 768 with 12 heads, on 128 tokens. All variants take turns, one call of each after the other. Weights are random: latency doesn't depend on them, as long as none are denormal. The levels are those of
`fastsparse.run training-aware --target onnxruntime`: channels are removed until so many FLOPs are left as the level says, in multiples of 16, and all but the first layer is INT8.
*ONNX Runtime's quantizer* makes INT8 of the fp32 file by its own static quantization, a yardstick for INT8 without removed channels.
"""
import argparse, tempfile, torch
from torch import nn
from copy import deepcopy
from pathlib import Path
from torchvision.models import mobilenet_v3_large,resnet18,resnet50
from fastsparse_create.benchmark import *
from fastsparse_create.experiment.plan import few_inputs
from fastsparse_create.export.onnx import *
from fastsparse_create.quantization.convert import *
from fastsparse_create.recipe.generate import removed_flops
from fastsparse_create.thinning import *
from record import Record, arguments

def bert_like(num_classes):
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation='gelu', batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(768, num_classes))

models = dict(resnet18=resnet18, resnet50=resnet50, mobilenet=mobilenet_v3_large, encoder=bert_like)

def items(name, n):
    "`n` items of what a model takes"
    return torch.randn(n, *((128,768) if name=='encoder' else (3,224,224)))

eager,ort,static = 'PyTorch eager','ONNX Runtime fp32',"ONNX Runtime's quantizer"
targets = {('40% of the FLOPs, INT8',eager):10, ('40% of the FLOPs, INT8',ort):6, ('15% of the FLOPs, INT8',eager):18, ('15% of the FLOPs, INT8',ort):10}

def trained_a_little(name):
    "A model whose batch norms have seen data"
    torch.manual_seed(0)
    model = models[name](num_classes=1000)
    with torch.no_grad():
        for _ in range(3): model(items(name, 4))
    return model.eval()

def thinned(model, x, flops):
    model = deepcopy(model)
    prune_channels_(model, x, flops=flops, share='uniform', round_to=16)
    return model

def quantized(model, x, ignore=()):
    model = deepcopy(model)
    quantize_(model, x, ignore=ignore)
    return model

def ort_static(path, x, to):
    "ONNX Runtime's own quantizer"
    from onnxruntime.quantization import CalibrationDataReader,QuantFormat,QuantType,quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    class Reader(CalibrationDataReader):
        def __init__(self): self.batches = iter([{'input':x.numpy()}])
        def get_next(self): return next(self.batches, None)
    quant_pre_process(path, to.with_suffix('.pre'))
    quantize_static(to.with_suffix('.pre'), to, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8)
    return to

def variants(name, folder, levels):
    "Name -> what is timed"
    model,x = trained_a_little(name),items(name, 8)
    fp32 = export_onnx(model, folder/'fp32.onnx', x)
    res = {eager:model, ort:fp32, 'INT8':export_onnx(quantized(model, x), folder/'int8.onnx', x, int8=True), static:ort_static(fp32.path, x, folder/'static.onnx')}
    for level in levels:
        small,left = thinned(model, x[:2], 1-removed_flops(level)),f'{1-removed_flops(level):.0%} of the FLOPs'
        res[f'{left}, fp32'] = export_onnx(small, folder/f'fp32_{level}.onnx', x)
        res[f'{left}, INT8'] = export_onnx(quantized(small, x, few_inputs(small, x[:2])), folder/f'int8_{level}.onnx', x, int8=True)
    return res

def megabytes(made):
    "Of a file, or of the parameters of a model"
    if isinstance(made, torch.nn.Module): return sum(4*t.numel() for t in made.parameters())/1e6
    return Path(made).stat().st_size/1e6

def peers_of(ours, names):
    "What `ours` is measured against"
    eagers = [n for n in names if n.startswith(eager)]
    return eagers if ours==ort else [*eagers, ort, *[static]*(ours=='INT8')]

def compare(record, name, batch, n_threads, rows, size):
    "Each of ours against each of its peers"
    case = f"{name}, batch {batch}, {n_threads} thread{'s'*(n_threads>1)}"
    for ours,r in rows.items():
        if ours.startswith(eager) or ours==static: continue
        for peer in peers_of(ours, rows):
            target,p = targets.get((ours,peer)) if batch==1 and name.startswith('resnet') else None,rows[peer]
            record.row(f'Latency, {ours}', case, r.ms, 'ms', peer, p.ms, 'speed', target and f'ratio >= {target}',
                       quartiles=[r.ms_q1,r.ms_q3], quartiles_of_peer=[p.ms_q1,p.ms_q3], CPU_ms=[r.cpu_ms,p.cpu_ms], MB=size[ours])

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--models', nargs='+', default=['resnet18','resnet50'], choices=list(models))
    p.add_argument('--batches', nargs='+', type=int, default=[1,32])
    p.add_argument('--threads', nargs='+', type=int, default=[1,2])
    p.add_argument('--levels', nargs='+', type=float, default=[.5,.8])
    p.add_argument('--rounds', type=int, default=40, help='of a batch of 1; larger batches get fewer')
    p.add_argument('--compiled', action='store_true', help='time torch.compile, too')
    args = arguments(p)
    levels = ', '.join(f'{1-removed_flops(l):.0%} for level {l}' for l in args.levels)
    with Record(args, f'Time on the clock, medians; images of 3x224x224, or 128 tokens; FLOPs that are left: {levels}', args.threads, ['onnxruntime']) as record:
        for name in args.models:
            with tempfile.TemporaryDirectory() as tmp:
                made = variants(name, Path(tmp), args.levels)
                size = {n:megabytes(m) for n,m in made.items()}
                for batch in args.batches:
                    for n_threads in args.threads:
                        found = benchmark(made, items(name, batch), max(5, args.rounds//batch), n_threads=n_threads, compiled=args.compiled)
                        compare(record, name, batch, n_threads, {r.model:r for r in found.rows}, size)

if __name__=='__main__': main()
