"""What a stranger does with exports, in a process that cannot import this repository.

`python visitor.py CHECK ANSWERS FOLDER…` looks at every folder with `check.py` and further, and writes what it
saw. Each folder has `expected.safetensors` with what the run answered.
"""

import importlib.util
import json
import sys
from pathlib import Path

sys.modules |= dict.fromkeys(("moeut_compose", "moeut_kernels"))

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def gradients(model, expected):
    """Largest difference of a gradient, relative to the largest gradient of that weight."""
    loss = model(expected["ids"], labels=expected["ids"]).loss
    loss.backward()
    worst = abs(loss.item() - expected["loss"].item())
    for name, parameter in model.named_parameters():
        wanted = expected[f"gradient.{name}"]
        found = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)))
    return worst


def alone_and_together(model, ids, **settings):
    """Whether two prompts of unequal length are continued alike alone and side by side, filled up on the left."""
    short, long = ids[:1, :4], ids[1:, :9]
    together = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.long), short), 1), long))
    mask = torch.ones_like(together)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    both = model.generate(together, attention_mask=mask, **settings)
    first = model.generate(short, attention_mask=torch.ones_like(short), **settings)
    second = model.generate(long, attention_mask=torch.ones_like(long), **settings)
    return torch.equal(both[0, 5:], first[0]) and torch.equal(both[1], second[0])


def alike(model, ids, one, other):
    """Whether two ways of generating write the same tokens."""
    written = []
    for settings in (one, other):
        torch.manual_seed(5)
        settings = {
            "max_new_tokens": 4,
            "pad_token_id": 0,
            "eos_token_id": None,
            "do_sample": False,
            **settings,
        }
        written.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    return torch.equal(*written)


def padding_is_no_input(model, ids):
    """Logits of tokens do not depend on what fills the batch up, on either side."""
    alone = model(ids[:, :6]).logits
    worst = 0.0
    for left in (True, False):
        filler = torch.full((2, 3), 5)
        wide = torch.cat((filler, ids[:, :6]) if left else (ids[:, :6], filler), 1)
        mask = torch.cat((0 * filler, 1 + 0 * ids[:, :6]) if left else (1 + 0 * ids[:, :6], 0 * filler), 1)
        logits = model(wide, attention_mask=mask).logits
        worst = max(worst, float((logits[:, 3:] - alone if left else logits[:, :6] - alone).abs().max()))
    return worst


def error_of(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def visit(check, folder, loader):
    """All that is seen of one model. `loader` is its class: the code of all exports is the same, and reading it slow."""
    expected = load_file(folder / "expected.safetensors")
    ids = expected["ids"]
    model = loader.from_pretrained(folder).eval()
    result = check.check_model(model, folder / "expected.safetensors", 4)
    model.generation_config = type(model.generation_config)()
    result["gradients"] = gradients(model, expected)
    with torch.no_grad():
        result["ragged"] = alone_and_together(model, ids)
        drawn = {"do_sample": True, "temperature": 0.9}
        result["sampled"] = alike(model, ids, drawn, drawn | {"use_cache": False})
        result["padding"] = padding_is_no_input(model, ids)
        result["layers of the cache"] = len(model(ids, use_cache=True).past_key_values)
        half = loader.from_pretrained(folder, dtype=torch.bfloat16)
        result["half"] = str(half(ids).logits.dtype)
    return result


def visit_once(check, folder):
    """What needs to be seen of one model only."""
    checked = check.check(folder, folder / "expected.safetensors")
    ids = load_file(folder / "expected.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    stopped = model.generate(
        **tokenizer("The sea", return_tensors="pt"),
        max_new_tokens=60,
        stop_strings=["e"],
        tokenizer=tokenizer,
    )
    tuned = folder / "tuned"
    with torch.no_grad():
        model.model.embedding.weight.mul_(1.5)
    model.save_pretrained(tuned, max_shard_size="400KB")
    tokenizer.save_pretrained(tuned)
    again = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True)
    config.architecture["stages"][0]["repeats"] += 1
    return {
        "beams": alone_and_together(model, ids, num_beams=3),
        "greedy": alike(model, ids, {"max_new_tokens": 24}, {"max_new_tokens": 24, "use_cache": False}),
        "lookup": alike(model, ids[:1], {}, {"prompt_lookup_num_tokens": 2}),
        "static": error_of(lambda: model.generate(ids, cache_implementation="static", max_new_tokens=2)),
        "offloaded": error_of(
            lambda: model.generate(ids, cache_implementation="offloaded", max_new_tokens=2)
        ),
        "checkpointing": error_of(model.gradient_checkpointing_enable),
        "positions": error_of(lambda: model(ids, position_ids=ids)),
        "mask": error_of(lambda: model(ids, attention_mask=0 * ids[:, :3])),
        "fresh": fresh.model.embedding.weight.std().item() * config.hidden_size**0.5,
        "checked": checked,
        "written": [tokenizer.decode(stopped[0]), stopped.shape[1]],
        "tuned": torch.equal(again(ids).logits, model(ids).logits),
        "padded": tokenizer(["The", "The sea was calm"], padding=True)["attention_mask"],
        "kinds": [type(part).__module__.split(".")[0] for part in (model, tokenizer, config)],
    }


def tokens(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    special = tokenizer.all_special_ids[0]
    odd = [*ids[0], special, *ids[0], len(tokenizer) + 7]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(each) for each in ids],
        "length": len(tokenizer),
        "special": tokenizer.convert_ids_to_tokens(special),
        "odd": [tokenizer.decode(odd), tokenizer.decode(odd, skip_special_tokens=True)],
    }


if __name__ == "__main__":
    check_file, answers, texts, *folders = map(Path, sys.argv[1:])
    spec = importlib.util.spec_from_file_location("check", check_file)
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    texts = json.loads(texts.read_text())
    models = [folder for folder in folders if (folder / "expected.safetensors").exists()]
    loader = type(AutoModelForCausalLM.from_pretrained(models[0], trust_remote_code=True))
    seen = {folder.name: visit(check, folder, loader) for folder in models}
    seen |= {folder.name: tokens(folder, texts) for folder in folders if folder not in models}
    seen["once"] = visit_once(check, models[0])
    answers.write_text(json.dumps(seen))
