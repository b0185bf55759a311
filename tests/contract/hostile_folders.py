"""Folders of a sound small model in which everything that could name code, another place or another model does so."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "code-was-run"
EVIL = f"import pathlib\npathlib.Path(__file__).with_name({MARK!r}).touch()\nclass Evil: pass\nclass EvilConfig: pass\n"
PROMPT = "the quick fox<|endoftext|> 12"

Change = Callable[[Path], None]
FOLDERS: dict[str, Change] = {}


class Pickled:
    """Runs code when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.mark = str(folder / MARK)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def json_file(name: str, **keys: Any) -> Change:
    """Add keys to a JSON file, or make it."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        stored = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**stored, **keys}))

    return change


def pickles(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Pickled(folder)))

    return change


def texts(content: str, *names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def vocabulary_and_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()


def twice(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"model_type": "evil", ', 1))


def linked(folder: Path) -> None:
    (folder / "elsewhere.json").symlink_to("/etc/passwd")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")


def folder(name: str, *changes: Change) -> None:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    FOLDERS[name] = change


_LOCAL = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
_REMOTE = {"AutoConfig": "org/evil--configuration_evil.EvilConfig", "AutoModelForCausalLM": "org/evil--m.Evil"}
_TOKENIZER = {"AutoTokenizer": ["tokenization_evil.Evil", None]}

for key, value in {
    "auto_map": _LOCAL,
    "trust_remote_code": True,
    "_attn_implementation": "org/kernel",
    "attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation_internal": "org/kernel:attend",
    "_attn_implementation_autoset": True,
    "experts_implementation": "org/kernel",
    "_experts_implementation": "org/kernel",
    "_name_or_path": "org/other-model",
    "name_or_path": "https://evil.example/model",
    "_commit_hash": "0" * 40,
    "custom_pipelines": {"text-generation": {"impl": "modeling_evil.Evil", "pt": ["AutoModelForCausalLM"]}},
    "architectures": ["EvilForCausalLM"],
    "adapter_model": "adapter",
    "base_model_name_or_path": "org/other-model",
    "tokenizer_class": "EvilTokenizer",
    "transformers_weights": "pytorch_model.bin",
    "torch_dtype": "evil",
    "hidden_act": "evil",
    "activation_function": "evil",
    "rope_scaling": {"rope_type": "evil", "factor": 2.0},
    "layer_types": ["evil"],
    "quantization_config": {"quant_method": "evil"},
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "org/kernel:norm"},
    "generation_config": {"custom_generate": "org/evil"},
    "model_type": "evil",
}.items():
    folder(f"config.json {key}", json_file("config.json", **{key: value}), pickles("pytorch_model.bin"))
folder("config.json auto_map of another repository", json_file("config.json", auto_map=_REMOTE))
folder(
    "config.json auto_map of a type unknown",
    json_file("config.json", auto_map=_LOCAL, model_type="evil", trust_remote_code=True),
)
folder("config.json a key twice", twice)

for key, value in {
    "auto_map": _TOKENIZER,
    "tokenizer_class": "EvilTokenizer",
    "tokenizer_file": "/etc/passwd",
    "vocab_file": "/etc/passwd",
    "name_or_path": "org/other-model",
    "backend": "custom",
    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}",
    "added_tokens_decoder": {"999999999": {"content": "<far>", "special": True}, "1000": {"content": "<odd>"}},
    "bos_token": {"content": "<|endoftext|>", "__type": "Evil"},
    "processor_class": "EvilProcessor",
}.items():
    folder(f"tokenizer_config.json {key}", json_file("tokenizer_config.json", **{key: value}))
folder(
    "tokenizer_config.json auto_map as a list", json_file("tokenizer_config.json", auto_map=_TOKENIZER["AutoTokenizer"])
)
folder(
    "tokenizer_config.json tokens of a wrong type", json_file("tokenizer_config.json", added_tokens_decoder={"1": 2})
)
folder("tokenizer_config.json is a list", texts("[]", "tokenizer_config.json"))
folder("tokenizer.json is a link out of the folder", linked)
folder("tokenizer.json is a pickle", without("tokenizer.json"), pickles("tokenizer.json"))
folder("tokenizer.model alone, a pickle", without("tokenizer.json"), pickles("tokenizer.model"))
folder(
    "vocab.json and merges.txt beside code",
    vocabulary_and_merges,
    json_file("tokenizer_config.json", auto_map=_TOKENIZER),
)
folder(
    "special_tokens_map.json",
    json_file("special_tokens_map.json", eos_token={"content": "<|endoftext|>"}, auto_map=_TOKENIZER),
)
for name in (
    "processor_config.json",
    "preprocessor_config.json",
    "feature_extractor.json",
    "video_preprocessor_config.json",
):
    folder(name, json_file(name, auto_map={"AutoProcessor": "modeling_evil.Evil"}))
folder("chat templates", texts("{{ 1 }}", "chat_template.jinja", "additional_chat_templates/x.jinja"))
folder(
    "generation_config.json", json_file("generation_config.json", custom_generate="org/evil", trust_remote_code=True)
)
folder("custom_generate", texts(EVIL, "custom_generate/generate.py", "custom_generate/requirements.py"))
folder(
    "pickles", pickles("pytorch_model.bin", "training_args.bin", "optimizer.pt", "consolidated.00.pth", "scheduler.pkl")
)
folder("an index of pickles", json_file("pytorch_model.bin.index.json", weight_map={"x": "pytorch_model.bin"}))
folder(
    "modules with the names of libraries",
    texts(EVIL, "torch.py", "transformers.py", "tokenizers.py", "conftest.py", "sitecustomize.py"),
)
folder("an index that leads out", json_file("model.safetensors.index.json", weight_map={"x": "../x.safetensors"}))
folder("an adapter", json_file("adapter_config.json", base_model_name_or_path="org/evil", peft_type="LORA"))

REFUSED = {
    *(f"config.json {key}" for key in ("hidden_act", "activation_function", "rope_scaling", "quantization_config")),
    *(f"config.json {key}" for key in ("use_kernels", "kernel_config", "model_type", "custom_pipelines")),
    "config.json trust_remote_code",
    "config.json layer_types",
    "config.json auto_map of a type unknown",
    "config.json a key twice",
    "tokenizer_config.json tokens of a wrong type",
    "tokenizer_config.json is a list",
    "tokenizer.json is a link out of the folder",
    "tokenizer.json is a pickle",
    "tokenizer.model alone, a pickle",
    "an adapter",
}
"""What cannot be run as it is written, and is refused with a word; all others give the sound model's logits."""


def make(root: Path, sound: list[Path]) -> list[Path]:
    """Every folder, from copies of sound models in turn."""
    made: list[Path] = []
    for i, (name, change) in enumerate(FOLDERS.items()):
        target = root / name.replace("/", " ")
        shutil.copytree(sound[i % len(sound)], target)
        for code in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
            (target / code).write_text(EVIL)
        change(target)
        made.append(target)
    return made


class Silent:
    """A standard input of which nothing may be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"standard input was asked for {name}")


def main(sound: list[str], folders: list[str]) -> None:
    """Run a prompt in every folder and print what was seen: results, and every audit event that names one of them."""
    import torch

    import virtual_weights as vw
    from virtual_weights.errors import VirtualWeightsError
    from virtual_weights.runtime import Run

    def logits(path: str) -> Any:
        run = Run.on_prompt(vw.open(path), PROMPT)
        with torch.no_grad():
            return run.module(run.chunks[0][None]).logits

    expected = [logits(path) for path in sound]
    events: list[list[str]] = []

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        text = " ".join(str(argument)[:300] for argument in arguments[:2])
        inside = any(path in text for path in folders)
        wanted = (".json", ".txt", ".safetensors", ".model")
        opened = event == "open" and inside and not str(arguments[0]).endswith(wanted)
        if opened or event.startswith(
            ("socket.", "subprocess.", "os.system", "os.exec", "builtins.input", "pickle.", "urllib")
        ):
            events.append([event, text])

    sys.addaudithook(seen)
    sys.stdin = Silent()  # type: ignore[assignment]
    results: dict[str, str] = {}
    for i, path in enumerate(folders):
        try:
            results[Path(path).name] = "right" if torch.equal(logits(path), expected[i % len(sound)]) else "wrong"
        except VirtualWeightsError as error:
            results[Path(path).name] = f"{type(error).__name__}: {error.what}"
    print(json.dumps({"results": results, "events": events}))


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    main(given["sound"], given["folders"])
