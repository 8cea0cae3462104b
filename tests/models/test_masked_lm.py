"""LLaDA in transformers' Llama: names, no causal mask, padding, saving, LoRA, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM

from diffalign.errors import DataError, ModelError
from diffalign.models.load import load_denoiser as load_picture_denoiser
from diffalign.models.masked_lm import MaskedLM, _llama, _ours, _theirs, load_denoiser, load_tokens, model_identity, new_folder
from diffalign.models.spec import LoRA, ModelSpec
from diffalign.models.weights import WeightBank
from diffalign.types import Cond

END, MASK = "<|endoftext|>", "<|mdm_mask|>"
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 24, "max_sequence_length": 12,
         "rope_theta": 500.0}


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "llada")


def make(folder, **options):
    words = {word: i for i, word in enumerate(["[UNK]", END, MASK, *"a b c d e f".split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END, MASK])
    new_folder(folder, tokenizer, {**SIZES, **options}, mask=MASK, end=END, seed=0)
    return folder


def spec_of(folder, **options):
    return ModelSpec(pretrained_model_name_or_path=str(folder), **{"lora": None, **options})


def edit(folder, name="config.json", **changes):
    tree = json.loads((folder / name).read_text())
    tree.update(changes)
    (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def logits(denoiser, ids, attended=None, wanted=None):
    ids = torch.tensor(ids)
    attended = torch.ones_like(ids, dtype=torch.bool) if attended is None else torch.tensor(attended).bool()
    wanted = torch.ones_like(ids, dtype=torch.bool) if wanted is None else wanted
    return denoiser.module(ids, attended, wanted).detach()


def test_a_later_token_changes_an_earlier_logit(folder):
    """No causal mask; the stock class has one."""
    denoiser = load_denoiser(spec_of(folder))
    one, other = logits(denoiser, [[3, 2, 4, 5]]), logits(denoiser, [[3, 2, 4, 6]])
    assert (one[:3] - other[:3]).abs().amax(1).min() > 1e-4
    stock = LlamaForCausalLM(denoiser.module.config)
    stock.load_state_dict(denoiser.module.state_dict())
    causal = [stock(torch.tensor([ids])).logits[0, :3] for ids in ([3, 2, 4, 5], [3, 2, 4, 6])]
    assert torch.equal(*causal)


def test_it_computes_what_lladas_modeling_file_says(folder):
    """Blocks written out from LLaDA's own file: norms, rotation by halves, grouped heads, silu(ff_proj) * up_proj."""
    w = load_file(folder / "model.safetensors")
    ids, heads, size = torch.tensor([3, 2, 4, 5, 2]), 2, 8

    def norm(x, weight):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def rotated(x):  # [heads, L, size]
        inverse = 1.0 / (500.0 ** (torch.arange(0, size, 2).float() / size))
        angles = torch.outer(torch.arange(len(ids)).float(), inverse).repeat(1, 2)
        first, second = x.view(*x.shape[:-1], 2, size // 2).unbind(-2)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    x = w["model.transformer.wte.weight"][ids]
    for i in range(2):
        p = {name: w[f"model.transformer.blocks.{i}.{name}.weight"] for name in (
            "attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")}
        y = norm(x, p["attn_norm"])
        q = rotated((y @ p["q_proj"].T).view(-1, heads, size).transpose(0, 1))
        k = rotated((y @ p["k_proj"].T).view(-1, 1, size).transpose(0, 1)).repeat(heads, 1, 1)
        v = (y @ p["v_proj"].T).view(-1, 1, size).transpose(0, 1).repeat(heads, 1, 1)
        attention = (q @ k.transpose(1, 2) / size**0.5).softmax(-1) @ v
        x = x + attention.transpose(0, 1).flatten(1) @ p["attn_out"].T
        y = norm(x, p["ff_norm"])
        x = x + (torch.nn.functional.silu(y @ p["ff_proj"].T) * (y @ p["up_proj"].T)) @ p["ff_out"].T
    expected = norm(x, w["model.transformer.ln_f.weight"]) @ w["model.transformer.ff_out.weight"].T
    assert torch.allclose(logits(load_denoiser(spec_of(folder)), [ids.tolist()]), expected, atol=1e-5)


def test_padding_changes_nothing_and_only_masks_are_answered(folder):
    denoiser = load_denoiser(spec_of(folder))
    short, padded = [[3, 2, 4, 2]], [[3, 2, 4, 2, 1, 1], [3, 3, 2, 4, 5, 6]]
    xt = torch.tensor(padded)
    cond = Cond(extra={"attended": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()})
    found = denoiser(xt, torch.ones(2), cond)
    alone = denoiser(torch.tensor(short), torch.ones(1), Cond(extra={"attended": torch.ones(1, 4, dtype=torch.bool)}))
    assert found.shape == (3, 9) and torch.allclose(found[:2], alone, atol=1e-6)


def test_names_there_and_back(folder):
    for name in load_file(folder / "model.safetensors"):
        assert _theirs(_ours(name)) == name
    assert _ours("model.transformer.blocks.11.ff_out.weight") == "model.layers.11.mlp.down_proj.weight"
    assert _ours("model.transformer.ff_out.weight") == "lm_head.weight"


def test_saving_gives_the_folder_back(folder, tmp_path):
    denoiser = load_denoiser(spec_of(folder))
    denoiser.module.save_pretrained(tmp_path / "again")
    assert model_identity(spec_of(tmp_path / "again")) == model_identity(spec_of(folder))
    assert torch.equal(logits(load_denoiser(spec_of(tmp_path / "again")), [[3, 2]]), logits(denoiser, [[3, 2]]))


def test_sharded_weights(folder):
    state = load_file(folder / "model.safetensors")
    before = logits(load_denoiser(spec_of(folder)), [[3, 2]])
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    assert torch.equal(logits(load_denoiser(spec_of(folder)), [[3, 2]]), before)


def test_lora_is_peft_in_lladas_names(folder, tmp_path):
    bank = WeightBank.build(load_denoiser(spec_of(folder)), LoRA(rank=2, alpha=4), reads=("policy", "reference"), seed=0)
    xt, cond = torch.tensor([[3, 2, 4]]), Cond(extra={"attended": torch.ones(1, 3, dtype=torch.bool)})
    assert torch.equal(bank.predict("reference", xt, None, cond), bank.predict("policy", xt, None, cond))
    with torch.no_grad():
        for x in bank.trainable().values():
            x.add_(0.1)
    assert not torch.equal(bank.predict("reference", xt, None, cond), bank.predict("policy", xt, None, cond))
    bank.save(tmp_path / "out", {"step": "1"})
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "base_model.model.model.transformer.blocks.0.attn_out.lora_A.weight" in state and len(state) == 16
    assert config["target_modules"] == ["attn_out", "k_proj", "q_proj", "v_proj"] and config["lora_alpha"] == 4
    # the same update, merged by hand into LLaDA's weights, gives the policy's logits
    merged = load_file(folder / "model.safetensors")
    for name in [name for name in state if ".lora_A." in name]:
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        merged[target] += config["lora_alpha"] / config["r"] * state[name.replace("lora_A", "lora_B")] @ state[name]
    want = bank.predict("policy", xt, None, cond).detach()
    save_file(merged, folder / "model.safetensors")
    assert torch.allclose(load_denoiser(spec_of(folder))(xt, None, cond), want, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(folder):
    def gradient(checkpointing):
        denoiser = load_denoiser(spec_of(folder))
        denoiser.module.train()
        if checkpointing:
            denoiser.module.enable_gradient_checkpointing()
        ids = torch.tensor([[3, 2, 4]])
        denoiser.module(ids, torch.ones_like(ids).bool(), ids == 2).sum().backward()
        return denoiser.module.model.layers[0].mlp.up_proj.weight.grad

    assert torch.equal(gradient(False), gradient(True)) and gradient(True).abs().max() > 0


def test_tokens(folder):
    tokens = load_tokens(spec_of(folder))
    assert tokens.prompt("a b") == [3, 4] and tokens.answer("c") == [5, 1]
    assert tokens.text([5, 6, 1, 3]) == "c d"
    for bad, words in (("", "empty"), (f"a {MASK}", "mask token")):
        with pytest.raises(DataError, match=words):
            tokens.answer(bad)
    with pytest.raises(ModelError, match="no chat template"):
        load_tokens(spec_of(folder), chat=True)
    edit(folder, "tokenizer_config.json", chat_template="{% for m in messages %}e {{ m.content }} f{% endfor %}")
    assert load_tokens(spec_of(folder), chat=True).prompt("a b") == [7, 3, 4, 8]


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"block_type": "sequential"}, "block_type"),
    ({"weight_tying": True}, "weight_tying"), ({"alibi": True}, "alibi"), ({"d_model": "16"}, "d_model"),
    ({"n_heads": 3}, "no multiple of n_heads"), ({"n_layers": 3}, "lacks 9 weights"), ({"n_layers": 1}, "unknown 9 weights"),
    ({"mlp_hidden_size": 32}, "cannot be loaded"), ({"mask_token_id": 400}, "no mask token"),
    ({"mask_token_id": 1}, "must differ"), ({"max_sequence_length": 0}, "max_sequence_length")])
def test_a_wrong_config_is_one_line(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(ModelError, match=words) as error:
        load_denoiser(spec_of(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_tokenizer_without_a_mask_token(folder):
    edit(folder, mask_token_id=None)
    load_tokens(spec_of(folder))  # the tokenizer names it
    edit(folder, "tokenizer_config.json", mask_token=None)
    if (folder / "special_tokens_map.json").exists():
        edit(folder, "special_tokens_map.json", mask_token=None)
    with pytest.raises(ModelError, match="no mask token"):
        load_tokens(spec_of(folder))


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(ModelError, match="likelihood.kind=masked"):
        load_picture_denoiser(spec_of(folder))
    with pytest.raises(ModelError, match="diffusers pipeline"):
        load_denoiser(spec_of("assets/tiny-sdxl"))
    with pytest.raises(ModelError, match="no such folder"):
        load_denoiser(spec_of(tmp_path / "nowhere"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokens(spec_of(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        load_tokens(spec_of(folder))


def test_only_safetensors_are_read(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle"):
        load_denoiser(spec_of(folder))


def test_a_python_file_beside_it_is_never_run(folder):
    (folder / "modeling_llada.py").write_text("raise SystemExit('ran')")
    edit(folder, auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    load_denoiser(spec_of(folder))
    load_tokens(spec_of(folder))


def test_published_sizes_build_without_memory():
    """LLaDA-8B's config: 8,015,581,184 parameters, its card says 8B; 291 tensors by LLaDA's names."""
    config = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
              "embedding_size": 126464, "max_sequence_length": 4096, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
    with torch.device("meta"):
        module = MaskedLM(_llama(config))
    assert sum(p.numel() for p in module.parameters()) == 2 * 126464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12288
                                                                                    + 2 * 4096) + 4096
    assert len({_theirs(name) for name in module.state_dict()}) == 291


def test_peft_reads_the_lora_onto_modules_of_lladas_names(folder, tmp_path):
    """A stand-in for LLaDA's own class, which is not here: modules by its names, without a forward."""
    from peft import PeftModel

    bank = WeightBank.build(load_denoiser(spec_of(folder)), LoRA(rank=2), reads=("policy",), seed=0)
    bank.save(tmp_path / "out", {})
    tree = torch.nn.Module()
    for name, weight in load_file(folder / "model.safetensors").items():
        *path, last = name.removesuffix(".weight").split(".")
        node = tree
        for part in path:
            node = node.get_submodule(part) if part in dict(node.named_children()) else _child(node, part)
        layer = torch.nn.Linear(*weight.T.shape, bias=False) if weight.dim() == 2 else torch.nn.RMSNorm(len(weight))
        node.add_module(last, layer)
    state = PeftModel.from_pretrained(tree, tmp_path / "out").state_dict()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, x in saved.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], x)


def _child(node, name):
    node.add_module(name, torch.nn.Module())
    return node.get_submodule(name)
