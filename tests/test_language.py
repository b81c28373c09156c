"Text, tokens and answers: files to models, and what is wrong with either"
import csv,json,os,random
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing here needs a network
import numpy as np,pytest,torch
from fastai.basics import Learner,Path,load_learner
from fastsparse_create.experiment.models import load_model
from fastsparse_create.experiment.use_case import find_use_case
from fastsparse_create.export.onnx import OnnxModel,onnx_ops
from fastsparse_create.quantization.convert import is_quantized
from fastsparse_create.selection import prunable
from commands import *

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
    assert {o.name for o in folder.iterdir()}=={'command.json','deployed.csv','history.csv','learner.pkl','logs','metrics.csv','metrics.json','model','model.onnx','model.pth','recipe.yaml','report.html'}
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

def test_model_onnx_has_the_promised_zeros(made):
    import onnx
    case,folder = made
    weights = [onnx.numpy_helper.to_array(o) for o in onnx.load(folder/'model.onnx').graph.initializer if o.data_type==onnx.TensorProto.INT8 and len(o.dims)==2]
    shares = [(w==0).mean() for w in weights if min(w.shape)>=32 and w.shape[0]<=128]  # those of layers; embeddings have more rows
    assert len(shares)>=12 and min(shares)>=.69

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

# other networks and formats

networks = {'distilbert':lambda n: transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=n, dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64)),
            'roberta':lambda n: transformers.RobertaModel(transformers.RobertaConfig(vocab_size=n, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=66, pad_token_id=0)),
            'electra':lambda n: transformers.ElectraModel(transformers.ElectraConfig(vocab_size=n, embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64))}

@pytest.mark.parametrize('kind', networks)
def test_other_networks(kind, data, tmp_path):
    tokenizer = make_tokenizer(corpus)
    folder = save_network(tmp_path/'model', lambda: networks[kind](len(tokenizer)), tokenizer)
    made = run(tmp_path/'out', '--use-case', 'sentiment', '--model', folder, '--data', data['text_classification'], '--epochs', '1', '--train-samples', '40', '--val-samples', '20', '--train-kwargs', '{"bs": 8}')
    assert float(rows(made)[1]['sparsity'])==pytest.approx(.7, abs=1e-3) and onnx_ops(made/'model.onnx', optimized=True)['MatMulIntegerToFloat']>=4
    assert load_model(made/'model.pth') is not None

def test_channels_are_removed_for_onnxruntime(data, tmp_path):
    tokenizer = make_tokenizer(corpus, model_input_names=['input_ids','token_type_ids','attention_mask'])
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256, max_position_embeddings=64)
    folder = save_network(tmp_path/'model', lambda: transformers.BertModel(config), tokenizer)
    made = run(tmp_path/'out', '--use-case', 'text_classification', '--model', folder, '--data', data['text_classification'], '--target', 'onnxruntime', '--epochs', '2', '--train-samples', '40', '--val-samples', '20')
    dense,thinned = rows(made)
    assert thinned['model']=='thinned' and int(thinned['flops'])<.6*int(dense['flops'])
    layer = load_model(made/'model.pth').network.bert.encoder.layer[0]
    assert layer.attention.self.query.out_features==16*layer.attention.self.num_attention_heads<64 and layer.intermediate.dense.out_features<256
    assert not [f for f in (made/'model').iterdir() if 'weights' in f.name or 'model' in f.name] and "load_model(&#x27;model.pth&#x27;)" in (made/"report.html").read_text()

def prepared(case, bert, source, **kwargs):
    case = find_use_case(case)
    return case.prepare(case.load(source), str(bert), case.options(**kwargs))

def test_formats_of_text(bert, tmp_path):
    rs = reviews(20, 0)
    for name,content in {'a.jsonl':lines(rs), 'a.json':rs, 'b.json':lines(rs), 'c.json':{'data':rs}, 'a.csv':as_csv(rs), 'a.tsv':as_csv(rs).replace(',positive','\tpositive').replace(',negative','\tnegative').replace('text,label','text\tlabel').replace('"','')}.items():
        data = prepared('text_classification', bert, write(tmp_path, {name:content})/name)
        assert [len(data.train), len(data.valid), data.classes]==[32,8,['negative','positive']], name
        assert sum(data.valid.targets)==4 and 'seed 42' in data.split

def test_pairs_of_texts(bert, tmp_path):
    rs = [{'premise':g, 'hypothesis':b, 'label':i%3} for i,(g,b) in enumerate(zip(good*3, bad*3))]
    data = prepared('text_classification', bert, write(tmp_path, {'x.jsonl':lines(rs)})/'x.jsonl')
    assert data.columns==['premise','hypothesis','label'] and data.classes==['0','1','2'] and 1 in data.train.rows[0]['token_type_ids']

def test_columns_by_option(bert, tmp_path):
    rs = [{'id':i, 'words':r['text'], 'mood':r['label'], 'label':'x'} for i,r in enumerate(reviews(10, 0))]
    data = prepared('sentiment', bert, write(tmp_path, {'x.csv':as_csv(rs)})/'x.csv', text='words', label='mood')
    assert data.columns==['words','mood'] and data.classes==['negative','positive']

def test_classes_are_in_the_order_of_a_trained_head(bert, tmp_path):
    source = write(tmp_path, {'x.jsonl':lines([{'text':t, 'label':c} for t in good for c in ('10','9','joy')])})/'x.jsonl'
    assert prepared('text_classification', bert, source).classes==['9','10','joy']
    config = transformers.AutoConfig.from_pretrained(bert, id2label={0:'joy',1:'9',2:'10'}, label2id={'joy':0,'9':1,'10':2})
    trained = save_network(tmp_path/'m', lambda: transformers.BertForSequenceClassification(config), transformers.AutoTokenizer.from_pretrained(bert))
    assert prepared('text_classification', trained, source).classes==['joy','9','10']
    other = write(tmp_path, {'y.jsonl':lines(reviews(5, 0))})/'y.jsonl'
    with pytest.raises(ValueError, match='3 classes .joy, 9, 10., the data have 2 classes'): prepared('text_classification', trained, other)
    case,options = find_use_case('text_classification'),find_use_case('text_classification').options(new_head=True)
    data = prepared('text_classification', trained, other, new_head=True)
    assert case.model(str(trained), data, options).classifier.out_features==2

def test_long_texts_are_cut_and_counted(bert, tmp_path):
    data = prepared('text_classification', bert, write(tmp_path, {'x.jsonl':lines([{'text':'film '*(5*i+1), 'label':i%2} for i in range(10)])})/'x.jsonl', max_length=16)
    assert data.length==16 and data.n_cut==7 and max(len(r['input_ids']) for r in data.train.rows)==16 and '7 longer ones were cut' in find_use_case('glue').facts(data, None)['Length']

def test_formats_of_tokens(bert, tmp_path):
    rng = random.Random(0)
    rs = [dict(zip(('tokens','ner_tags'), sentence(rng))) for _ in range(20)]
    a = prepared('ner', bert, write(tmp_path, {'x.jsonl':lines(rs)})/'x.jsonl')
    b = prepared('ner', bert, write(tmp_path, {'x.csv':as_csv([{'words':' '.join(r['tokens']), 'tags':' '.join(r['ner_tags'])} for r in rs])})/'x.csv')
    c = prepared('ner', bert, write(tmp_path, {'x.conll':'\n\n'.join('\n'.join(map(' '.join, zip(r['tokens'], r['ner_tags']))) for r in rs)})/'x.conll')
    numbers = [{'tokens':r['tokens'], 'ner_tags':[a.classes.index(t) for t in r['ner_tags']]} for r in rs]
    d = prepared('ner', bert, write(tmp_path, {'n.json':numbers})/'n.json', names=','.join(a.classes))
    assert a.classes==b.classes==c.classes==d.classes==['B-LOC','B-ORG','B-PER','I-LOC','I-ORG','I-PER','O']
    assert a.valid.rows==b.valid.rows==c.valid.rows and a.valid.targets==b.valid.targets==c.valid.targets==d.valid.targets

def test_no_word_of_a_long_sentence_is_lost(bert, tmp_path):
    words,tags = (sum(o, []) for o in zip(*(sentence(random.Random(i)) for i in range(30))))
    source = write(tmp_path, {'x.jsonl':lines([{'tokens':words, 'tags':tags}]*5)})/'x.jsonl'
    data = prepared('token_classification', bert, source)
    assert data.length==128 and len(data.valid)>1 and set(data.valid.sentence)=={0}
    assert [data.classes[t] for ts in data.valid.targets for t in ts if t>=0]==tags

class Perfect:
    "A learner whose predictions are right but for some"
    def __init__(self, dataset): self.dl = type('DL', (), {'dataset':dataset})()

def test_metrics_of_entities(bert, data):
    d = prepared('ner', bert, data['named_entity_recognition'])
    case,learn = find_use_case('ner'),Perfect(d.valid)
    *_,y = case.dls(d, case.options(bs=30)).valid.one_batch()
    for wrong,expected in ((False,[1,1,1,1]),(True,[0,0,0,float((y[y>=0]==d.classes.index('O')).float().mean())])):
        learn.y,learn.pred = y,torch.nn.functional.one_hot(torch.full_like(y, d.classes.index('O')) if wrong else y.clamp(min=0), len(d.classes)).float()
        metrics = [f() for f in case.metrics.values()]
        for m in metrics: m.accumulate(learn)
        assert [m.value for m in metrics]==pytest.approx(expected)

def test_entities_as_seqeval_has_them():
    get_entities = pytest.importorskip('seqeval.metrics.sequence_labeling').get_entities
    from fastsparse_create.experiment.tokens import entities
    rng = random.Random(0)
    for _ in range(2000):
        tags = rng.choices(['O','B-A','I-A','E-A','S-A','B-B','I-B'], k=6)
        assert entities(tags)==set(get_entities(tags)), tags

def test_formats_of_answers(bert, tmp_path):
    flat = [{'question':q['question'], 'context':p['context'], 'answers':{k:[a[k] for a in q['answers']] for k in ('text','answer_start')}} for a in squad(10, 0, 'v1.1')['data'] for p in a['paragraphs'] for q in p['qas']]
    simple = [{'question':r['question'], 'context':r['context'], 'answer':r['answers']['text'][0]} for r in flat]
    sets = [prepared('qa', bert, write(tmp_path, {n:c})/n) for n,c in {'s.json':squad(10, 0, 'v1.1'), 'f.jsonl':lines(flat), 's.csv':as_csv(simple)}.items()]
    for d in sets: assert len(d.records)==4 and d.valid.targets==sets[0].valid.targets and all(t!=[0,0] for t in d.valid.targets)

def test_answers_off_by_a_character_are_mended(bert, tmp_path):
    data = squad(10, 0)
    for a in data['data']: a['paragraphs'][0]['qas'][0]['answers'][0]['answer_start'] += 1
    d = prepared('qa', bert, write(tmp_path, {'x.json':data})/'x.json')
    assert all(q.start<0 or q.context[q.start:].startswith(q.answers[0]) for q in d.records)

# what is wrong

fine = {'text':'good', 'label':'a'}
pages = [
    ('text_classification', 'x.jsonl', lines([fine]*3)+'{"text": "a", "label":\n', 'x.jsonl:4: isn\'t valid JSON'),
    ('text_classification', 'x.csv', 'text,label\ngood,a\nbad\n', 'x.csv:3: has 1 fields'),
    ('text_classification', 'x.csv', 'words,label\ngood,a\n'*2, "x.csv:2: has no column 'text'; its columns are words, label"),
    ('text_classification', 'x.csv', b'text,label\ngood,a\nb\xe4d,b\n', "x.csv:3: the byte 0xe4 isn't UTF-8"),
    ('text_classification', 'x.csv', '', 'holds no examples'),
    ('text_classification', 'x.xlsx', '', 'expected a file that ends in'),
    ('text_classification', 'x.jsonl', lines([fine]*3), "all labels are 'a'"),
    ('sentiment_analysis', 'x.jsonl', lines([fine, {'text':'b'}]), "x.jsonl:2: has no 'label'"),
    ('ner', 'x.jsonl', lines([{'tokens':['a'], 'tags':['O','O']}]*5), 'x.jsonl:'),
    ('ner', 'x.txt', 'Anna B-PER\nleft\n', 'x.txt:2: expected a word and its tag'),
    ('question_answering', 'x.json', json.dumps({'data':[{'paragraphs':[{'context':'Anna left.', 'qas':[{'question':'Who?', 'answers':[{'text':'Bo', 'answer_start':0}]}]}]}]*5}), "entry"),
    ('question_answering', 'x.json', '{"data": [\n{"paragraphs" []}]}', 'x.json:2: isn\'t valid JSON'),
]

@pytest.mark.parametrize('case,file,content,said', pages)
def test_data_that_cannot_be_trained_with(case, file, content, said, bert, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/file).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refused(capsys, '--use-case', case, '--model', bert, '--data', tmp_path/file)
    assert said in text and file in text
    assert [o.name for o in tmp_path.iterdir()]==[file]

@pytest.mark.parametrize('model,said', [('/nowhere/bert','no such folder'),('bert.pth','expected a folder that save_pretrained'),('no-such-model','nothing of this name can be fetched from the Hugging Face hub')])
def test_models_that_are_not_there(model, said, data, capsys):
    assert said in refused(capsys, '--use-case', 'glue', '--model', model, '--data', data['text_classification'])

def test_a_label_that_only_validation_has(bert, tmp_path, capsys):
    source = write(tmp_path, {'train.jsonl':lines(reviews(5, 0)), 'dev.jsonl':lines([*reviews(2, 0), {'text':'a', 'label':'mixed'}])})
    assert "dev.jsonl:5: the training texts have no label 'mixed'" in refused(capsys, '--use-case', 'glue', '--model', bert, '--data', source)

def test_a_full_disk_is_an_os_error(bert, tmp_path):
    from fastsparse_create.experiment import language
    from test_checkpoint import full_disk
    model,tokenizer = (f(str(bert), *args) for f,args in ((language.load_language_model,('AutoModelForSequenceClassification',language.load_config(str(bert)))),(language.load_tokenizer,())))
    with full_disk(10_000), pytest.raises(OSError, match='File too large') as e: language.save_language_model(model, tokenizer, tmp_path/'model')
    assert e.value.filename==str(tmp_path/'model') and not list((tmp_path/'model').glob('*.safetensors'))

def test_without_transformers_the_extra_is_named(data, bert, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'transformers', None)
    assert 'pip install fastsparse_create[nlp]' in refused(capsys, '--use-case', 'glue', '--model', bert, '--data', data['text_classification'])

def test_options_are_checked(data, bert, capsys):
    args = '--use-case','qa','--model',bert,'--data',data['question_answering']
    assert "did you mean 'stride'?" in refused(capsys, *args, '--train-kwargs', '{"strid": 3}')
    assert 'max_length 900 is more than the 128 tokens' in refused(capsys, *args, '--train-kwargs', '{"max_length": 900}')
    assert "eval_metric 'accuracy' is not known, accepted: f1, exact_match" in refused(capsys, *args, '--eval-metric', 'accuracy')
