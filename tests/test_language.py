"Text, tokens and answers: files to models, and what is wrong with either"
import csv,json,os,random
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing here needs a network
import numpy as np,pytest,torch
from fastai.basics import Learner,Path,load_learner
from fastsparse_create.cli import main
from fastsparse_create.experiment.models import load_model
from fastsparse_create.experiment.use_case import find_use_case
from fastsparse_create.export.onnx import OnnxModel,onnx_ops
from fastsparse_create.quantization.convert import is_quantized
from fastsparse_create.selection import prunable

transformers = pytest.importorskip('transformers')

# data: sentences of a small grammar, names from lists

people = 'Anna Boris Chen Dora Emil Fatima Goran Hana Ivan Jun'.split()
families = 'Smith Ivanova Wei Lopez Novak Haddad Okoye Tanaka Berg Moreau'.split()
places = 'Paris|Lagos|Lima|Oslo|New York|Kuala Lumpur|Cairo|Quito'.split('|')
firms = 'Acme|Globex|Northern Rail|Blue Harbour Bank|Initech|Orbit'.split('|')
templates = ['{P} of {F} flew to {L} on Monday .','In {L} , {F} said that {P} would leave .','{P} was born in {L} and works for {F} .','Shares of {F} fell in {L} .',
             'The mayor of {L} met {P} .','{F} opens an office in {L} , said {P} .']

def sentence(rng):
    "Words, tags"
    names = {'P':(f'{rng.choice(people)} {rng.choice(families)}','PER'), 'F':(rng.choice(firms),'ORG'), 'L':(rng.choice(places),'LOC')}
    words,tags = [],[]
    for w in rng.choice(templates).split():
        text,kind = names[w[1]] if w[0]=='{' else (w,None)
        for i,o in enumerate(text.split()):
            words.append(o)
            tags.append('O' if kind is None else f"{'I' if i else 'B'}-{kind}")
    return words,tags

def conll(n, seed):
    rng = random.Random(seed)
    return '-DOCSTART- -X- -X- O\n\n'+'\n\n'.join('\n'.join(f'{w} NN I-NP {t}' for w,t in zip(*sentence(rng))) for _ in range(n))+'\n'

def squad(n, seed, version='v2.0'):
    rng,data = random.Random(seed),[]
    for _ in range(n):
        a,b = rng.sample(people, 2)
        home,work = rng.sample(places, 2)
        context = f'{a} lives in {home}. {b} works in {work} for {rng.choice(firms)}.'
        qas = [{'id':'1', 'question':f'Where does {a} live?', 'answers':[{'text':home, 'answer_start':context.index(home)}]},
               {'id':'2', 'question':f'Where does {b} work?', 'answers':[{'text':work, 'answer_start':context.index(work)}]}]
        if version=='v2.0': qas.append({'id':'3', 'question':f'Where does {b} live?', 'answers':[], 'is_impossible':True})
        data.append({'title':a, 'paragraphs':[{'context':context, 'qas':qas}]})
    return {'version':version, 'data':data}

good,bad = 'a stirring , funny and moving film|wonderful acting and a clever story|the best comedy of the year|i love it'.split('|'),'dull and far too long|a mess without a story|the worst acting of the year|i want my money back'.split('|')

def reviews(n, seed):
    rng = random.Random(seed)
    return [{'text':rng.choice(['','honestly ','it is ','critics say '])+rng.choice(good if label=='positive' else bad), 'label':label} for _ in range(n) for label in ('positive','negative')]

def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name,content in files.items(): (folder/name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder

def lines(rows): return ''.join(json.dumps(o)+'\n' for o in rows)

def as_csv(rows):
    import io
    out = io.StringIO()
    w = csv.DictWriter(out, list(rows[0]))
    w.writeheader()
    w.writerows(rows)
    return out.getvalue()

# models: a tokenizer of the words of the data, and a network of random weights

special = {n:f'[{n[:-6].upper()}]' for n in ('pad_token','unk_token','cls_token','sep_token','mask_token')}

def make_tokenizer(texts, **kwargs):
    from tokenizers import Tokenizer,models,normalizers,pre_tokenizers,processors,trainers
    t = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    t.normalizer,t.pre_tokenizer = normalizers.BertNormalizer(),pre_tokenizers.BertPreTokenizer()
    t.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=600, special_tokens=list(special.values()), show_progress=False))
    t.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1', [(o, t.token_to_id(o)) for o in ('[CLS]','[SEP]')])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, model_max_length=128, **special, **kwargs)

def save_network(folder, network, tokenizer):
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    network().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

corpus = [json.dumps(squad(60, 0)), conll(60, 0), *good, *bad, 'honestly critics say it is']

@pytest.fixture(scope='session')
def bert(tmp_path_factory):
    tokenizer = make_tokenizer(corpus, model_input_names=['input_ids','token_type_ids','attention_mask'])
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128)
    return save_network(tmp_path_factory.mktemp('bert'), lambda: transformers.BertModel(config), tokenizer)

@pytest.fixture(scope='session')
def data(tmp_path_factory):
    "A folder for each use case"
    root = tmp_path_factory.mktemp('data')
    return {'text_classification':write(root/'text', {'train.jsonl':lines(reviews(80, 0)), 'valid.jsonl':lines(reviews(20, 1))}),
            'named_entity_recognition':write(root/'ner', {'eng.train':conll(120, 0), 'eng.testa':conll(30, 1), 'eng.testb':conll(30, 2)}),
            'question_answering':write(root/'qa', {'train-v2.0.json':squad(60, 0), 'dev-v2.0.json':squad(15, 1)})}

def run(tmp_path, *args):
    "The folder that the command writes"
    assert main(['training-aware', *map(str, args), '--working-dir', str(tmp_path)])==0
    folder, = tmp_path.iterdir()
    return folder

def rows(folder, name='metrics.csv'): return list(csv.DictReader((folder/name).open()))

# the command

columns = {'text_classification':['accuracy'], 'named_entity_recognition':['f1'], 'question_answering':['f1']}

@pytest.fixture(scope='session', params=['text_classification','named_entity_recognition','question_answering'])
def made(request, bert, data, tmp_path_factory):
    "An experiment of each use case: name, folder"
    folder = run(tmp_path_factory.mktemp('made'), '--use-case', f'nlp-{request.param}', '--model', bert, '--data', data[request.param], '--epochs', '4', '--train-kwargs', '{"lr": 0.005, "bs": 16}')
    return request.param,folder

def test_the_command_writes_everything(made):
    case,folder = made
    assert folder.name.startswith(f'training_aware_{case}_')
    assert {o.name for o in folder.iterdir()}=={'deployed.csv','history.csv','learner.pkl','metrics.csv','model','model.onnx','model.pth','recipe.yaml','report.html'}
    dense,sparse = rows(folder)
    assert list(dense)[1]==columns[case][0] and float(sparse['sparsity'])==pytest.approx(.7, abs=1e-3) and float(dense['sparsity'])<.01
    assert 'Traceback' not in (folder/'report.html').read_text()

def test_what_is_learned(made):
    case,folder = made
    score = {'text_classification':.85, 'named_entity_recognition':.8, 'question_answering':.25}[case]  # the last of little training
    assert all(float(r[columns[case][0]])>score for r in rows(folder)), rows(folder)

def test_model_onnx_computes_in_integers_and_as_well(made):
    case,folder = made
    assert onnx_ops(folder/'model.onnx', optimized=True)['MatMulIntegerToFloat']>=12
    metric = columns[case][0]
    assert abs(float(rows(folder, 'deployed.csv')[-1][metric])-float(rows(folder)[-1][metric]))<.05
    assert [o['what'] for o in rows(folder, 'deployed.csv')]==['dense, PyTorch','dense, ONNX Runtime','model.onnx']

def test_the_files_hold_the_same_zeros(made):
    case,folder = made
    model,learn = load_model(folder/'model.pth'),load_learner(folder/'learner.pkl')
    assert is_quantized(model) and is_quantized(learn.model)
    zeros = {n:int((p.param==0).sum()) for n,p in prunable(model).items()}
    assert zeros=={n:round(p.param.numel()*.7) for n,p in prunable(model).items()}
    auto = {'text_classification':'AutoModelForSequenceClassification', 'named_entity_recognition':'AutoModelForTokenClassification', 'question_answering':'AutoModelForQuestionAnswering'}[case]
    plain = getattr(transformers, auto).from_pretrained(folder/'model')
    assert {n:int((plain.state_dict()[n]==0).sum()) for n in zeros}==zeros
    xb = torch.randint(5, 50, (2,16)),torch.ones(2, 16).long(),torch.zeros(2, 16).long()
    with torch.no_grad(): assert torch.allclose(model(*xb), learn.model.eval()(*xb), atol=1e-5)

def test_the_snippet_of_the_report_runs(made, monkeypatch):
    case,folder = made
    from html import unescape
    page = unescape((folder/'report.html').read_text())
    code = page[page.index('# the file that was measured'):page.index('# the network with its zeros')]
    monkeypatch.chdir(folder)
    values = {'text_classification':{'texts':good}, 'named_entity_recognition':{'sentences':['Anna Smith flew to Lima .']}, 'question_answering':{'questions':['Where does Anna live?'], 'contexts':['Anna lives in Lima.']}}[case]
    exec(code, values)
    assert len(values['logits'])==len(next(iter(values[n] for n in ('texts','sentences','questions') if n in values)))
    if case=='text_classification': assert (values['logits'].argmax(-1)==1).all()

def test_the_report_shows_predictions(made):
    case,folder = made
    page = (folder/'report.html').read_text()
    said = {'text_classification':'how sure', 'named_entity_recognition':'(LOC)', 'question_answering':'(no answer)'}[case]
    assert said in page and f"one {({'text_classification':'text', 'named_entity_recognition':'sentence', 'question_answering':'question'})[case]}, one thread" in page
    assert 'from_pretrained' in page

def test_a_sparse_model_is_the_start_of_another(made, bert, data, tmp_path):
    case,folder = made
    again = run(tmp_path, '--use-case', case, '--model', folder/'model', '--data', data[case], '--optim-level', '0', '--epochs', '1', '--train-kwargs', '{"lr": 1e-6, "bs": 16}')
    metric = columns[case][0]
    assert abs(float(rows(again)[0][metric])-float(rows(folder)[1][metric]))<.1
