"""Fixtures for all tests: tiny real models and tokenizers, saved to disk as a user would have them."""

from __future__ import annotations

import os
import secrets
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair, which may be busy with the tests beside these.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell has what it runs in the background ignore Ctrl-C, and every command that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read by huggingface_hub when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a probe is a pure function of its address",
    "one byte per gradient is all that crosses the wire",
    "replicas never exchange weights and never drift apart",
    "a good film with a warm heart and a clever end",
    "a dull film with a cold heart and a silly end",
    "the ledger is the run and the weights are the ledger applied",
]

VOCABULARY = 128
"""Rows of the embeddings of every tiny model."""


@dataclass(frozen=True)
class S3:
    """A server of the S3 protocol in this process, with one bucket per test.

    Attributes:
        address: of the server, `http://127.0.0.1:PORT`.
        bucket: name of the test's own bucket.
        client: of another maker than the one that is tested.
    """

    address: str
    bucket: str
    client: Any

    def uri(self, *names: str) -> str:
        return "/".join((f"s3://{self.bucket}", *names))

    def put(self, place: Path, *names: str) -> str:
        """Upload the files of a folder; returns its URI."""
        for path in sorted(each for each in place.rglob("*") if each.is_file()):
            self.write(path.read_bytes(), *names, path.relative_to(place).as_posix())
        return self.uri(*names)

    def write(self, content: bytes, *names: str) -> str:
        self.client.put_object(Bucket=self.bucket, Key="/".join(names), Body=content)
        return self.uri(*names)

    def names(self, prefix: str = "") -> list[str]:
        """Keys of the bucket that begin so, without the empty ones that stand for folders."""
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        return [each["Key"] for each in found if not each["Key"].endswith("/")]

    def read(self, *names: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key="/".join(names))["Body"].read())

    def delete(self, *names: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key="/".join(names))

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Let the server ask for credentials that it knows, for the time of the block; the test's are not."""
        try:
            self._tell("reset-auth", b"0")
            yield
        finally:
            self._tell("reset-auth", b"inf")

    def _tell(self, what: str, content: bytes) -> None:
        # Of another type, it would be taken apart before it is read.
        kind = {"Content-Type": "application/octet-stream"}
        asked = urllib.request.Request(f"{self.address}/moto-api/{what}", content, kind, method="POST")
        urllib.request.urlopen(asked, timeout=30).close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of moto's server; this process and those it starts find it by `AWS_ENDPOINT_URL`."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield address
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> S3:
    """An empty bucket of a real server of the S3 protocol."""
    import boto3

    made = S3(s3_server, f"bucket-{secrets.token_hex(4)}", boto3.client("s3", endpoint_url=s3_server))
    made.client.create_bucket(Bucket=made.bucket)
    return made


class TinyModel(Protocol):
    """`tiny_model(kind, folder, **config)`: a random model and its tokenizer saved to a folder, which is returned."""

    def __call__(self, kind: str, folder: Path, **config: Any) -> Path: ...


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`tiny_tokenizer(**special_tokens)`: a word-level tokenizer over SENTENCES, of at most VOCABULARY tokens."""
    return make_tokenizer


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """Makes tiny models; kinds are gpt2, opt, llama, qwen3, gemma, mistral, mixtral, t5, bert, roberta and vit."""
    return make_model


def make_tokenizer(style: str = "gpt2") -> Any:
    """A word-level tokenizer; `style` decides its special tokens, as those of the model of that name."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special: dict[str, str] = {"unk_token": "<unk>", "eos_token": "</s>"}
    if style in ("bert", "roberta"):
        special = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    elif style in ("llama", "opt", "gemma", "mistral", "mixtral", "qwen3"):
        special |= {"bos_token": "<s>"}
    elif style == "t5":
        special |= {"pad_token": "<pad>"}
    # Every style has the same numbers, 0 to 5, for the special tokens of all.
    tokens = ["</s>", "<pad>", "<unk>", "<s>", "[CLS]", "[SEP]"]
    tokens += sorted({word for sentence in SENTENCES for word in sentence.split()})
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = processors.TemplateProcessing
    if "cls_token" in special:
        backend.post_processor = template(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
        )
    elif "bos_token" in special:
        backend.post_processor = template(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 3)])
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if style == "bert" else [])]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


def make_model(kind: str, folder: Path, **config: Any) -> Path:
    """Saves a random model of a kind under folder/kind; `config` overrides keys of its Hugging Face configuration.

    `head` overrides the class: `causal_lm` (the default where there is one), `classification`, `base`.
    """
    import torch
    import transformers

    head = config.pop("head", None)
    prefix, sizes, default_head = _KINDS[kind]
    family = getattr(transformers, f"{prefix}Config")
    common = {} if kind == "vit" else {"vocab_size": VOCABULARY, "eos_token_id": 0, "bos_token_id": 3}
    if kind in ("bert", "roberta", "t5", "opt"):
        common["pad_token_id"] = 1
    if kind == "t5":
        common["decoder_start_token_id"] = 1
    settings = family(**{**common, **sizes, **config})
    suffix = {
        "causal_lm": {"gpt2": "LMHeadModel", "bert": "LMHeadModel"}.get(kind, "ForCausalLM"),
        "masked_lm": "ForMaskedLM",
        "seq2seq_lm": "ForConditionalGeneration",
        "classification": "ForImageClassification" if kind == "vit" else "ForSequenceClassification",
        "base": "Model",
    }[head or default_head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, prefix + suffix)(settings)
        # Freshly made biases and norms are 0 and 1, which would hide mistakes with them.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.05 * torch.randn_like(parameter)
    transformers.utils.logging.disable_progress_bar()
    target = folder / kind
    model.save_pretrained(target)
    if kind != "vit":
        make_tokenizer(kind).save_pretrained(target)
    return target


_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "causal_lm"),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        "causal_lm",
    ),
    "llama": ("Llama", _DECODER, "causal_lm"),
    "qwen3": ("Qwen3", _DECODER, "causal_lm"),
    "gemma": ("Gemma", _DECODER, "causal_lm"),
    "mistral": ("Mistral", _DECODER, "causal_lm"),
    "mixtral": ("Mixtral", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, "causal_lm"),
    "t5": (
        "T5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_decoder_layers": 2},
        "seq2seq_lm",
    ),
    "bert": ("Bert", _ENCODER, "masked_lm"),
    # RoBERTa's positions start behind those of the padding token, so 66 rows hold 64 positions.
    "roberta": ("Roberta", {**_ENCODER, "max_position_embeddings": 66, "type_vocab_size": 1}, "masked_lm"),
    "vit": (
        "ViT",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": 3,
        },
        "classification",
    ),
}
