"""prompts.py against open_clip, transformers and hand-made cases. Vocabulary: open_clip's copy."""
import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch

import prompts
from prompts import TaskPrompts, TextError, TextTower, Tokenizer

GOLDEN = {  # ids of CLIP's own tokenizer
    "road": [1759], "traffic light": [3399, 1395], "construction vehicle": [4585, 5299], "X": [343],
    "direct drivable area": [6016, 1203, 23088, 2445],
    "there is a car in the scene.": [997, 533, 320, 1615, 530, 518, 3562, 269],
}
ODD = ["", " \t\n ", "hello   World", "Ünïcödé &amp;amp; <b>", "日本語 text 123 don't", "...!!!",
       "🚗🚙 cars", "ＦＵＬＬ width", "schÃ¶n", "x" * 60, "I’m WE'LL it's", "１２３ ½ ²",
       "\x00\x07 control", "a&nbsp;b", "a_b/c-d", "naïve café\u0301", "ß ſ İ"]
TASKS = {"detection": ("car", "traffic light"), "drivable": ("direct", "alternative", "background")}
NAMES = [name for names in TASKS.values() for name in names]


@pytest.fixture(scope="module")
def tokenizer():
    open_clip = pytest.importorskip("open_clip")
    return Tokenizer(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture
def tower():
    return TextTower(width=64, layers=2, embed_dim=32)


def test_token_ids_are_clips_also_of_odd_strings_and_of_bytes(tokenizer):
    assert {text: tokenizer.encode(text) for text in GOLDEN} == GOLDEN
    reference = pytest.importorskip("open_clip").SimpleTokenizer()
    texts = [*ODD, "car " * 100]
    assert torch.equal(tokenizer(texts, truncate=True), reference(texts))
    with pytest.raises(TextError, match="tokens, the tower reads at most 77"):
        tokenizer(texts)

    bytewise = Tokenizer(prompts.BYTES)                                     # with CLIP's ids
    assert bytewise.encode("\x01 ? %") == tokenizer.encode("\x01 ? %")      # no merges in them
    spelled = bytewise.encode("a car")
    assert len(spelled) == 4 and spelled[0] == tokenizer.encode("a")[0] and max(spelled) < 512


def test_vocabulary_is_checked(tmp_path, monkeypatch):
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.write_bytes(b"downloaded")
    with pytest.raises(TextError, match="sha256"):
        Tokenizer(source).encode("car")
    monkeypatch.setattr(prompts, "CACHE", cache)
    digest = hashlib.sha256(b"downloaded").hexdigest()
    monkeypatch.setattr(prompts, "VOCABULARY", (source.as_uri(), digest))
    assert prompts.find_vocabulary().read_bytes() == b"downloaded"
    monkeypatch.setattr(prompts, "VOCABULARY", (source.as_uri(), "0" * 64))
    (cache / "source").unlink()
    with pytest.raises(OSError, match="expected \"0000"):
        prompts.find_vocabulary()
    assert not list(cache.iterdir())                          # nothing half-downloaded is left


def test_features_equal_open_clip(tmp_path, tokenizer):
    clip = pytest.importorskip("open_clip").model
    vision = clip.CLIPVisionCfg(layers=1, width=64, image_size=32, patch_size=16)
    text = clip.CLIPTextCfg(width=128, heads=2, layers=3)
    model = clip.CLIP(32, vision, text, quick_gelu=True).eval().requires_grad_(False)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tower = prompts.load_text_tower(tmp_path / "clip.pt")
    tokens = tokenizer(["a car", "a rather long sentence about the traffic light over there", ""])
    uncut = tower.encode_embeddings(tower.token_embedding(tokens), tokens.argmax(1))
    alone = torch.cat([tower(row[None]) for row in tokens])                 # cut at its own EOT
    for features in (tower(tokens), alone, uncut):
        torch.testing.assert_close(features, model.encode_text(tokens), atol=1e-5, rtol=1e-5)


def test_features_equal_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=64, eos_token_id=prompts.EOT, bos_token_id=prompts.SOT)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    torch.save(model.state_dict(), tmp_path / "clip.bin")
    tower = prompts.load_text_tower(tmp_path / "clip.bin")
    tokens = tokenizer(["a car", "the traffic light over there"])
    expected = model(tokens).text_embeds.detach()
    torch.testing.assert_close(tower(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")                         # torch.jit is deprecated
def test_openai_archive_in_half_precision(tmp_path, tower, monkeypatch):
    monkeypatch.setattr(TextTower, "forward", lambda self, x: x)
    tower.register_buffer("context_length", torch.tensor(77))
    torch.jit.trace(tower.half(), torch.zeros(1)).save(tmp_path / "clip.pt")
    monkeypatch.undo()
    loaded, tokens = prompts.load_text_tower(tmp_path / "clip.pt"), Tokenizer(prompts.BYTES)("car")
    assert loaded.text_projection.dtype == torch.float32
    torch.testing.assert_close(loaded(tokens), tower.float()(tokens))       # halved above


def test_misfit_and_unreadable_checkpoints_name_the_reason(tmp_path, tower):
    state = tower.state_dict()
    state["transformer.resblocks.0.surprise"] = state.pop("transformer.resblocks.0.ln_1.bias")
    torch.save(state, tmp_path / "clip.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name, message in [
            ("clip.pt", "2 tensors: transformer.resblocks.0.ln_1.bias, .*surprise"),
            ("other.pt", "has no 'positional_embedding'"), ("list.pt", "found no tensors"),
            ("text.pt", "text.pt is neither"), ("absent.pt", "no file .*absent.pt")]:
        with pytest.raises(TextError, match=message):
            prompts.load_text_tower(tmp_path / name)


def test_task_prompts_are_sot_contexts_or_words_name_stop_eot(tokenizer, tower):
    source = TaskPrompts(tower, tokenizer, TASKS, num_contexts=5)
    embed, expected = tower.token_embedding.weight, []
    for name, row in zip(NAMES, (0, 0, 1, 1, 1)):
        x = torch.cat([embed[[prompts.SOT]], source.contexts[row], embed[tokenizer.encode(name)],
                       embed[[*tokenizer.encode("."), prompts.EOT]]])
        expected.append(tower.encode_embeddings(x[None], torch.tensor([len(x) - 1])))
    torch.testing.assert_close(source(), torch.cat(expected))
    assert list(dict(source.named_parameters())) == list(source.state_dict()) == ["contexts"]
    source().square().sum().backward()
    assert (source.contexts.grad.abs().sum(2) > 0).all()
    assert all(p.grad is None for p in tower.parameters())
    source = TaskPrompts(tower, tokenizer, TASKS, words="a photo of a")
    sentences = tokenizer([f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(source(), tower(sentences))
    with pytest.raises(TextError, match="expected at least one"):
        TaskPrompts(tower, tokenizer, TASKS, words="")


def test_frozen_contexts_are_encoded_once(tower, monkeypatch):
    source = TaskPrompts(tower, Tokenizer(prompts.BYTES), TASKS).requires_grad_(False)
    real, runs = tower.encode_embeddings, []
    monkeypatch.setattr(tower, "encode_embeddings", lambda *args: runs.append(1) or real(*args))
    with torch.inference_mode():
        first = source()
    assert source() is first and not first.is_inference() and len(runs) == 1
    with torch.no_grad():
        source.contexts += 1
    assert not torch.equal(source(), first) and len(runs) == 2
    assert source.double()().dtype == torch.float64 and len(runs) == 3
    source.float().requires_grad_()().sum().backward()                      # they learn again
    assert source.contexts.grad is not None and len(runs) == 4


def test_templates(tower):
    assert len(set(prompts.ENSEMBLE)) == 63
    filled = prompts.fill_template("a photo of {article} {}.", "alternative_lane")
    assert filled == "a photo of an alternative lane."
    tokenizer = Tokenizer(prompts.BYTES)
    encode = partial(prompts.encode_templates, tower, tokenizer, ("car", "bus"))
    texts = tokenizer(["there is a bus in the scene.", "a photo of a bus."])
    for text, templates in zip(tower(texts), (prompts.ENGINEERED, ["a photo of {article} {}."])):
        torch.testing.assert_close(encode(templates)[1], text)
    texts = [prompts.fill_template(t, "bus") for t in prompts.ENSEMBLE]
    texts = [f"This is {t}" if t.split()[0] in ("a", "an", "the") else t for t in texts]
    mean = torch.nn.functional.normalize(tower(tokenizer(texts)), dim=1).mean(0)
    torch.testing.assert_close(encode()[1], mean / mean.norm())
