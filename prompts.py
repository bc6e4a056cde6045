"""CLIP's text side in one file: tokenizer, frozen text tower, task prompts with learned contexts.

Supplies the Language-to-Vision adapter of "Effective Adaptation in Multi-Task Co-Training for
Unified Autonomous Driving" (NeurIPS 2022) with class embeddings. It also works alone:

    Tokenizer          byte-pair encoding as CLIP does it (Radford et al. 2021, arXiv 2103.00020)
    TextTower          CLIP's text transformer; `load_text_tower` takes its sizes from a checkpoint
    TaskPrompts        [SOT][learned contexts of the task][class name][.][EOT] for every class
                       (CoOp, Zhou et al. 2022, arXiv 2109.01134, with contexts for each task)
    encode_templates   hand-written prompts: one sentence (prompt engineering) or many (ensembling)

Example (a small random tower on bytes; real runs use `load_text_tower` and `Tokenizer()`):

>>> tower = TextTower(width=64, layers=2, embed_dim=32)
>>> tasks = {"detection": ("car", "traffic light"), "drivable": ("direct", "background")}
>>> prompts = TaskPrompts(tower, Tokenizer(BYTES), tasks)
>>> prompts().shape                                           # [K, D], K = all classes of all tasks
torch.Size([4, 32])
>>> encode_templates(tower, Tokenizer(BYTES), tasks["detection"], ENGINEERED).shape
torch.Size([2, 32])
"""
import gzip
import hashlib
import html
import re
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOT, EOT = 49406, 49407                  # start and end of text; EOT is the largest id of all
CONTEXT_LENGTH = 77
BYTES = "bytes"                          # Tokenizer(BYTES): no vocabulary, every byte is a token
CACHE = Path.home() / ".cache" / "clip"  # where OpenAI's own package keeps its files
VOCABULARY = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
              "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
RELEASES = "https://openaipublic.azureedge.net/clip/models"
TOWERS = {  # sha256 of OpenAI's archives, which is part of their addresses
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "ViT-B-32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
}

ENGINEERED = ("there is a {} in the scene.",)          # the paper, appendix D.1
ARTICLES = ("{article}", "the")                        # the first becomes "a" or "an"
ENSEMBLE = (                                           # the 63 sentences of ViLD (arXiv 2104.13921)
    *(f"There is {a} {{}} in the scene." for a in ARTICLES),
    *(f"a photo of {a} {{}} in the scene." for a in (*ARTICLES, "one")),
    *(f"itap of {a} {{}}." for a in (*ARTICLES, "my")),      # "I took a picture"
    *(f"a photo of {a} {{}}." for a in (*ARTICLES, "my", "one", "many")),
    *(f"a {x} photo of {a} {{}}." for x in ("good", "bad", "bright", "dark") for a in ARTICLES),
    *(f"a photo of {a} {x} {{}}." for a in ("a", "the") for x in
      ("nice", "cool", "weird", "small", "large", "clean", "dirty", "hard to see")),
    *(f"a {x} photo of {a} {{}}." for a in ARTICLES for x in
      ("low resolution", "cropped", "close-up", "jpeg corrupted", "blurry", "pixelated",
       "black and white")),
    *(f"{a} {x} {{}}." for a in ("a", "the") for x in ("plastic", "toy", "plushie", "cartoon")),
    "an embroidered {}.", "the embroidered {}.", "a painting of a {}.", "a painting of the {}.",
)


class TextError(ValueError):
    """Says why a vocabulary, checkpoint or text cannot be used, and what to do."""


# ---------------------------------------------------------------------------------------- files

def cached(url: str, digest: str, folder: Path | None = None) -> Path:
    """Returns the cached file of a URL, downloading it first if necessary. digest: the first digits
    of its sha256. folder: by default CACHE."""
    path = (folder or CACHE) / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        except (OSError, RuntimeError) as error:                    # RuntimeError: another hash
            raise OSError(f"{url} cannot be downloaded to {path}: {error}") from None
    return path


def find_vocabulary(path: str | Path | None = None) -> Path:
    """Returns the file of CLIP's vocabulary: `path` if given, else the cached or downloaded one.
    Raises TextError if the file is another one, OSError if the download fails."""
    url, digest = VOCABULARY
    path = Path(path or cached(url, digest))
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != digest:
        raise TextError(f"{path} has sha256 {actual}, expected CLIP's {digest}: get {url}.")
    return path


def find_tower(name: str) -> Path:
    """Returns the checkpoint `name` (a key of TOWERS), downloading it first if necessary."""
    if name not in TOWERS:
        raise TextError(f"{name!r} is neither a file nor one of {', '.join(TOWERS)}.")
    return cached(f"{RELEASES}/{TOWERS[name]}/{name}.pt", TOWERS[name])


# ------------------------------------------------------------------------------------ tokenizer

@lru_cache
def byte_alphabet() -> dict[int, str]:
    """Maps each of the 256 bytes, in the order of the vocabulary's ids, to GPT-2's printable
    character: visible Latin-1 characters to themselves, the others to characters from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Tokenizer:
    """Encodes texts by CLIP's lower-cased byte-pair encoding.

    vocab: path of bpe_simple_vocab_16e6.txt.gz, read at first use. None takes the cached file or
        downloads it. BYTES needs no file: each byte is a token, with CLIP's id of that byte, which
        is enough for a tower with random weights.
    """

    pattern = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                            r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __init__(self, vocab: str | Path | None = None):
        self.vocab = vocab
        self.bpe = lru_cache(maxsize=65536)(self.bpe)    # a cache of its own for each vocabulary

    @cached_property
    def merges(self) -> dict[tuple[str, str], int]:
        """Maps pairs of symbols to their rank; the lowest rank merges first."""
        if self.vocab == BYTES:
            return {}
        lines = gzip.open(find_vocabulary(self.vocab), "rt", encoding="utf-8").read().split("\n")
        lines = lines[1:SOT - 512 + 1]           # after the header: merges of ids 512 to SOT - 1
        return {tuple(line.split()): rank for rank, line in enumerate(lines)}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Maps symbols to ids: 256 bytes, 256 bytes that end a word, one symbol for each merge."""
        alphabet = list(byte_alphabet().values())
        symbols = alphabet + [s + "</w>" for s in alphabet]
        symbols += ["".join(pair) for pair in self.merges]
        ids = {symbol: i for i, symbol in enumerate(symbols)}
        return ids | {"<|startoftext|>": SOT, "<|endoftext|>": EOT}

    def bpe(self, word: str) -> tuple[int, ...]:
        """Encodes one word of the byte alphabet into ids."""
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return (self.ids[word],)
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = zip(symbols, symbols[1:])
            best = min(pairs, key=lambda pair: self.merges.get(pair, len(self.merges)))
            if best not in self.merges:
                break
            merged, i = [], 0
            while i < len(symbols):
                step = 2 if tuple(symbols[i:i + 2]) == best else 1
                merged.append("".join(symbols[i:i + step]))
                i += step
            symbols = merged
        return tuple(self.ids[symbol] for symbol in symbols)

    def encode(self, text: str) -> list[int]:
        """Encodes a text into ids without SOT, EOT and padding."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = re.sub(r"\s+", " ", text).strip().lower()
        alphabet = byte_alphabet()
        words = ("".join(alphabet[b] for b in word.encode()) for word in self.pattern.findall(text))
        return [i for word in words for i in self.bpe(word)]

    def __call__(self, texts: str | Sequence[str], length: int = CONTEXT_LENGTH,
                 truncate: bool = False) -> Tensor:
        """Encodes N texts into int64 [N, length]: SOT, the text's ids, EOT, zeros. If a text is too
        long, raises TextError or, with truncate=True, cuts it (EOT comes last)."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for padded, text in zip(tokens, texts):
            ids = [SOT, *self.encode(text), EOT]
            if len(ids) > length:
                if not truncate:
                    raise TextError(f"{text!r} has {len(ids)} tokens, the tower reads at most "
                                    f"{length}: shorten it or use fewer context tokens.")
                ids = [*ids[:length - 1], EOT]
            padded[:len(ids)] = torch.tensor(ids)
        return tokens


# ----------------------------------------------------------------------------------- text tower

class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block with causal attention; names as in CLIP's checkpoints."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:                                    # [N, L, W]
        heads = self.attn.num_heads
        qkv = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)     # [N, heads, L, d]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn.out_proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    """CLIP's text transformer, frozen: gradients reach its inputs, but not its parameters.

    width, layers, embed_dim (D), context_length, vocab_size: as in the checkpoint, whose shapes
        `load_text_tower` reads. The number of heads is width / 64, as in every CLIP model.
    seed: determines the initial weights, which follow CLIP's initial distribution.
    """

    def __init__(self, *, width: int = 512, layers: int = 12, embed_dim: int = 512,
                 context_length: int = CONTEXT_LENGTH, vocab_size: int = EOT + 1, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)    # torch.manual_seed resets the GPUs' too
            self.token_embedding = nn.Embedding(vocab_size, width)
            self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
            self.transformer = nn.Module()
            self.transformer.resblocks = nn.ModuleList(
                Block(width, max(1, width // 64)) for _ in range(layers))
            self.ln_final = nn.LayerNorm(width)
            self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            residual_std = width ** -0.5 * (2 * layers) ** -0.5
            for block in self.transformer.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
        self.requires_grad_(False)

    def encode_embeddings(self, x: Tensor, eot: Tensor) -> Tensor:
        """Encodes token embeddings [N, L, W] into features [N, D], given EOT positions [N].
        Attention is causal, so callers may cut L after the last EOT without changing features."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() + self.positional_embedding[:x.shape[1]]
            for block in self.transformer.resblocks:
                x = block(x)
            x = x[torch.arange(len(x), device=x.device), eot]                 # [N, W]
            return self.ln_final(x) @ self.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        """Encodes int64 tokens [N, L] into float32 features [N, D], not normalised."""
        eot = tokens.argmax(1)                           # EOT is the largest id
        if len(tokens):
            tokens = tokens[:, :int(eot.max()) + 1]
        return self.encode_embeddings(self.token_embedding(tokens), eot)


LAYER = r"^text_model\.encoder\.layers\.(\d+)\."
TRANSFORMERS_NAMES = (  # transformers' CLIP names -> CLIP's own
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (LAYER + r"layer_norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (LAYER + r"mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (LAYER + r"mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (LAYER + r"self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^text_projection\.weight$", "text_projection"),
)
NOT_TEXT = re.compile(  # names in CLIP's checkpoints that are not the text tower's
    r"^(visual\.|vision_model\.|visual_projection\.|logit_scale$|logit_bias$|input_resolution$|"
    r"context_length$|vocab_size$|attn_mask$|.*\.position_ids$)")


def clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames a text state dict from transformers' names to CLIP's own, joining q, k and v."""
    renamed = {}
    for key, value in state.items():
        projection = re.match(LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)$", key)
        if projection is None:
            name = key
            for pattern, replacement in TRANSFORMERS_NAMES:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value.T if key == "text_projection.weight" else value
        elif projection[2] == "q":                       # joins k and v too
            qkv = [state.get(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            if any(value is None for value in qkv):
                raise TextError(f"{key} has no k_proj or v_proj beside it: the checkpoint is "
                                "incomplete.")
            layer, _, kind = projection.groups()
            renamed[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return renamed


def read_text_state(path: str | Path) -> dict[str, Tensor]:
    """Reads a CLIP checkpoint's text tensors under CLIP's names: OpenAI's TorchScript archive or
    a state dict of CLIP, open_clip or transformers (bare or under `state_dict`)."""
    if not Path(path).is_file():
        raise TextError(f"no file {path}: expected CLIP's {', '.join(TOWERS)}, or a state dict.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # TorchScript is announced as deprecated
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as refused:  # torch raises many kinds, all meaning: no plain state dict
            try:
                state = torch.jit.load(str(path), map_location="cpu").state_dict()
            except Exception:
                raise TextError(f"{path} is neither a state dict nor a TorchScript archive "
                                f"({refused}): expected a CLIP checkpoint.") from refused
    state = state if isinstance(state, dict) else {}
    state = {re.sub(r"^(module\.)?(text\.)?", "", str(key)): value
             for key, value in state.get("state_dict", state).items() if isinstance(value, Tensor)}
    if any(key.startswith("text_model.") for key in state):
        state = clip_names(state)
    return {key: value for key, value in state.items() if not NOT_TEXT.match(key)}


def load_text_tower(path: str | Path) -> TextTower:
    """Loads a CLIP checkpoint's text tower in float32, with the sizes of its tensors. Assumes
    QuickGELU, as in all of OpenAI's weights, since files do not name the activation."""
    state = read_text_state(path)
    try:
        length, width = state["positional_embedding"].shape
        vocab_size = len(state["token_embedding.weight"])
        embed_dim = state["text_projection"].shape[1]
    except KeyError as missing:
        raise TextError(f"{path} has no {missing}: expected the text tower of a CLIP checkpoint, "
                        f"found {', '.join(list(state)[:4]) or 'no tensors'}.") from None
    blocks = {key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}
    tower = TextTower(width=width, layers=len(blocks), embed_dim=embed_dim, context_length=length,
                      vocab_size=vocab_size)
    expected = {(key, value.shape) for key, value in tower.state_dict().items()}
    misfits = expected ^ {(key, value.shape) for key, value in state.items()}
    if misfits:
        names = sorted({key for key, _ in misfits})
        raise TextError(f"{path} does not fit CLIP's text tower in {len(names)} tensors: "
                        f"{', '.join(names)}.")
    tower.load_state_dict({key: value.float() for key, value in state.items()})
    return tower


# -------------------------------------------------------------------------------------- prompts

class TaskPrompts(nn.Module):
    """Computes class embeddings from learned prompts, [SOT][contexts of the task][class name][.]
    [EOT] (CoOp, arXiv 2109.01134).

    tower: frozen. It moves with the module but is not in its parameters or state dict, so that a
        checkpoint holds only the contexts.
    tasks: {task: class names}. K counts the classes of all tasks, in this order.
    num_contexts: learned tokens of each task, shared by its classes, initialised from N(0, 0.02).
    words: initialises the contexts from this text's tokens, one each; replaces num_contexts.
    """

    def __init__(self, tower: TextTower, tokenizer: Tokenizer, tasks: dict[str, Sequence[str]], *,
                 num_contexts: int = 16, words: str | None = None):
        super().__init__()
        device = tower.text_projection.device
        length, width = tower.positional_embedding.shape
        if words is not None:
            tokens = tokenizer([words], length=length)[0].to(device)
            embedded_words = tower.token_embedding(tokens[1:tokens.argmax()])    # no SOT, EOT
            num_contexts = len(embedded_words)
        if num_contexts < 1:
            raise TextError(f"{num_contexts} contexts were given, expected at least one.")
        object.__setattr__(self, "tower", tower)         # not registered as a submodule
        self.text_dim = tower.text_projection.shape[1]   # D
        names = [name.replace("_", " ") for classes in tasks.values() for name in classes]
        self.texts = [f"{'X ' * num_contexts}{name}." for name in names]     # X: a context's place
        tokens = tokenizer(self.texts, length=length).to(device)              # [K, length]
        eot = tokens.argmax(1)                                                # [K]
        embedded = tower.token_embedding(tokens[:, :int(eot.max()) + 1])      # [K, L, W]
        self.register_buffer("embedded", embedded.detach().clone(), persistent=False)
        self.register_buffer("eot", eot, persistent=False)
        self.counts = [len(classes) for classes in tasks.values()]            # of each task
        if words is None:
            contexts = torch.randn(len(self.counts), num_contexts, width).to(device) * 0.02
        else:
            contexts = embedded_words.detach().repeat(len(self.counts), 1, 1)
        self.contexts = nn.Parameter(contexts)           # [tasks, num_contexts, W]
        self._cached = None, None                        # features, the contexts' version

    def _apply(self, fn, recurse=True):
        self.tower._apply(fn, recurse)
        self._cached = None, None
        return super()._apply(fn, recurse)

    def forward(self) -> Tensor:
        """Returns float32 features [K, D] of all tasks, not normalised. Frozen contexts are encoded
        only once."""
        if self.contexts.requires_grad:
            return self.encode()
        if self._cached[1] != self.contexts._version:    # the number of in-place changes
            with torch.inference_mode(False):            # a later graph may need normal tensors
                self._cached = self.encode(), self.contexts._version
        return self._cached[0]

    def encode(self) -> Tensor:
        """Encodes the prompts into features [K, D] without the cache."""
        # expand, since indexing has a non-deterministic backward
        contexts = torch.cat([c.expand(n, -1, -1) for c, n in zip(self.contexts, self.counts)])
        prefix, suffix = self.embedded[:, :1], self.embedded[:, 1 + contexts.shape[1]:]
        return self.tower.encode_embeddings(torch.cat([prefix, contexts, suffix], 1), self.eot)


def fill_template(template: str, name: str) -> str:
    """Fills a class name into a sentence by ViLD's rules: "_" becomes a space, "/" becomes "or",
    "{article}" becomes "a" or "an"."""
    name = name.replace("_", " ").replace("/", " or ").lower().rstrip(".")
    return template.format(name, article="an" if name[:1] in "aeiou" else "a")


@torch.no_grad()
def encode_templates(tower: TextTower, tokenizer: Tokenizer, names: Sequence[str],
                     templates: Sequence[str] = ENSEMBLE) -> Tensor:
    """Encodes hand-written prompts into features [K, D] (appendix D.1; CLIP's and ViLD's recipe).
    With several templates, prefixes sentences that begin with an article by "This is" and returns
    the L2-normalised mean of the sentences' L2-normalised features."""
    device, length = tower.text_projection.device, len(tower.positional_embedding)
    texts = [fill_template(template, name) for name in names for template in templates]
    if len(templates) > 1:
        texts = [re.sub(r"^(?=(a|an|the) )", "This is ", text) for text in texts]
    batches = tokenizer(texts, length).split(256)
    features = torch.cat([tower(tokens.to(device)) for tokens in batches])    # [K * templates, D]
    if len(templates) == 1:
        return features
    features = F.normalize(features, dim=1).unflatten(0, (len(names), len(templates)))
    return F.normalize(features.mean(1), dim=1)                               # [K, D]
