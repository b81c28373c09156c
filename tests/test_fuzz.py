"Ten thousand hostile inputs of those that scripts/fuzz.py makes by the million, and those that once found something"
import json,logging,subprocess,sys
from pathlib import Path
import pytest
from hypothesis import HealthCheck,given,settings,strategies as st
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'scripts'))
import fuzz

@pytest.fixture(autouse=True)
def quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)

@pytest.mark.parametrize('target,n', fuzz.shares(list(fuzz.targets), 8000).items())
def test_mutations(target, n):
    failures,_ = fuzz.fuzz(target, n)
    assert not failures, '\n'.join(f[:1500] for f in failures[:3])

@pytest.mark.parametrize('target', fuzz.targets)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=80) | st.lists(st.sampled_from(fuzz.hostile), max_size=20).map(''.join))
def test_texts(target, text): fuzz.check(target, text)

laughs = 'a0: &a0 [x]\n'+''.join(f'a{i+1}: &a{i+1} [{",".join([f"*a{i}"]*9)}]\n' for i in range(30))
answer = lambda start: f'[{{"question":"q","context":"c","answers":[{{"text":"c","answer_start":{start}}}]}}]'

# What went on for ever, or ended in something else than the library's own words
once = dict(
    csv=[','.join(f'c{i}' for i in range(30_000))+'\n'+'1,'*29_999+'1\n'], classes=['\n'.join(f'c{i}' for i in range(30_000))],
    data_yaml=[laughs+'train: images/train\nnames: *a30\n', '['*5000, '{'*3000, 'train: images/train\nval: images/val\nnames: ['+','.join(f'c{i}' for i in range(9000))+']', 'train: /\nnames: [a]', 'path: /\ntrain: usr\nnames: [a,b]\n', 'train: !!timestamp 99999-99-99\nnames: [a]'],
    json=['['*100_000, '{"a":'*100_000, '{"a":1}\n'+'['*100_000, '[1'+'0'*5000+']', '['*1200+']'*1200], jsonl=['['*100_000, '{"a":'*90_000, '{"a":'+'9'*5000+'}'],
    squad=['{"data":[{"paragraphs":'+'['*90_000, answer('1e400'), answer('Infinity'), answer('9'*400), answer('[]')], options=['['*90_000, '{"a":'*90_000, '('*90_000, '{"lr":'+'9'*5000+'}'],
    pattern=['(a{50000})'*20, '((a{99}){99}){99}', '(?R)'*100, '('*480, '(?P<a>'*80, '[a-z]{1,1000}'*30, '(?:(?:(?:a{1,99}){1,99}){1,99})b', '(?e)(?:cats|cat){e<=50}', '(a|a)*[bc]$', '.*'*200+'!'],
    selection=['x'*200_000, '.'*200_000, 'module.'*20_000, ''], mask_type=['block'+'9'*4000, '9'*4000+':'+'9'*4000, '0:0', 'x'*200_000, '['+'1,'*20_000+']'], table=['image,label\n'+''.join(f'{i}.png,a\n' for i in range(10_000)), 'image,label\n\0,a\n', 'image,label\n'+'a'*5000+',a\n', 'image,label\nimages/train/../../../../etc/passwd,a\n'],
    labels=['1 '*100_000, '9'*200_000+' 1 1 1 1', '1e308 .1 .1 .1 .1'], override=['a='+'['*5000, '{"a":'*30_000, '{"a":'+'9'*5000+'}'], recipe=['modifiers:\n  - !DistillationModifier {teacher: "\\0"}', 'modifiers:\n  - !DistillationModifier {teacher: '+'a'*50_000+'}'])

@pytest.mark.parametrize('target', once)
def test_found_once(target):
    for text in once[target]: fuzz.check(target, text)

@pytest.mark.parametrize('start', ['1e400','Infinity'])
def test_messages(start):
    "A message says what is wrong and where, not that something overflowed"
    with pytest.raises(ValueError, match='answer_start must be a whole number, got inf'): fuzz.targets['squad'][1](answer(start))

@pytest.mark.parametrize('text,said', [('[{"a": 1},\n'+'['*100_000, 'a.json:1: .*nested too deeply'), ('[\n'+'1'*5000+']', 'a.json:1: '), ('[{"a": 1},\n}', 'a.json:2: ')])
def test_json_messages(text, said):
    with pytest.raises(ValueError, match=said): fuzz.targets['json'][1](text)

def test_the_script():
    "In a process of its own, whose memory is limited"
    done = subprocess.run([sys.executable, '-W', 'ignore', fuzz.__file__, '1000', '--seed', '7'], capture_output=True, text=True)
    assert done.returncode==0 and ' 0 failures' in done.stdout.splitlines()[-1], done.stdout+done.stderr[-1000:]

def test_the_script_sees_who_takes_memory():
    code = f"import sys; sys.path.insert(0, {str(Path(fuzz.__file__).parent)!r}); import fuzz; fuzz.targets['probe'] = 1,lambda t: bytearray(250<<20),['x']; print(fuzz.fuzz('probe', 1, is_limited=True)[0])"
    assert 'MemoryError' in subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True).stdout

def test_what_must_hold(monkeypatch):
    "The fuzzer sees what it is to see"
    monkeypatch.setattr(fuzz, 'SECONDS', .02)
    def slow(text): sum(range(3*10**6))
    def wrong(text): raise KeyError(text)
    for f,said in (slow,'takes'),(wrong,'KeyError'):
        fuzz.targets['probe'] = 1,f,['x']
        try:
            failures,_ = fuzz.fuzz('probe', 1)
            assert len(failures)==1 and said in failures[0]
        finally: del fuzz.targets['probe']
