"""Workflows: what users of transformers do with a model."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from workflow_cases import Case, call, check, count_parameters, fresh, loss_of, same, train, workflow

GROUP = "transformers"


@workflow(GROUP, "generate, greedy with a cache", "Llama", "GPT-2", graph=False)
def generate(case: Case) -> None:
    """With the cache as without it."""
    words = generated(case, do_sample=False)
    check(torch.equal(words, generated(case, do_sample=False, use_cache=False)), "the cache changes what is generated")


@workflow(GROUP, "generate, beams and samples", "Llama", graph=False)
def beams(case: Case) -> None:
    generated(case, num_beams=3)
    generated(case, do_sample=True, top_k=5, num_return_sequences=2)


@workflow(GROUP, "generate of an encoder and decoder", "T5", graph=False)
def translate(case: Case) -> None:
    start = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 6, "max_new_tokens": 6}
    words = [case.model.generate(case.inputs["input_ids"], **start, use_cache=c) for c in (True, False)]
    check(words[0].shape[1] == 7 and torch.equal(*words), "the cache changes what is generated")


@workflow(GROUP, "generate from sound", "Whisper", graph=False)
def transcribe(case: Case) -> None:
    features = case.inputs["input_features"]
    options = {"decoder_input_ids": torch.ones(len(features), 1, dtype=torch.long), "pad_token_id": 0, "eos_token_id": None}
    encoded = case.model.get_encoder()(features)
    words = case.model.generate(encoder_outputs=encoded, **options, max_new_tokens=5, do_sample=False)
    check(words.shape == (len(features), 5), f"{tuple(words.shape)} words")


def generated(case: Case, **options: Any) -> Tensor:
    ids = case.inputs["input_ids"]
    words = case.model.generate(ids, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **options)
    check(words.shape[1] == ids.shape[1] + 6, f"{words.shape[1] - ids.shape[1]} words instead of 6")
    return words


@workflow(GROUP, "a cache by hand: the prompt, then a word", "Llama", graph=False)
def cache_by_hand(case: Case) -> None:
    ids = case.inputs["input_ids"]
    with torch.no_grad():
        first = case.model(ids[:, :-1], use_cache=True)
        last = case.model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        same([last.logits[:, -1]], [case.model(ids).logits[:, -1]], 1e-5)


@workflow(GROUP, "save_pretrained, from_pretrained in a new process", "Llama", "BERT", "Gemma 3", "T5", graph=False)
def pretrained(case: Case) -> None:
    case.model.save_pretrained(case.folder / "saved")
    load = f"import transformers; model = transformers.{type(case.model).__name__}.from_pretrained('saved')"
    same(case.elsewhere(load), case.run(), 1e-6)


@workflow(GROUP, "a padded batch, then a longer one", "BERT, padded")
def padding(case: Case) -> None:
    alone = {k: v[1:, :-4].contiguous() for k, v in case.inputs.items()}
    logits = [case.run(inputs=inputs)[-1] for inputs in (alone, case.inputs)]
    same([logits[1][1:, :-4]], [logits[0]], 1e-4)
    longer = {k: v.repeat(2, 2) for k, v in case.inputs.items()}
    check(case.run(inputs=longer)[-1].shape[:2] == longer["input_ids"].shape, "the batch has another shape")


@workflow(GROUP, "hidden states and attentions", "BERT", graph=False)
def hidden_states(case: Case) -> None:
    case.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = case.model(**case.inputs, output_hidden_states=True, output_attentions=True)
    layers = case.model.config.num_hidden_layers
    check(len(out.hidden_states) == layers + 1 and len(out.attentions) == layers, "states are missing")
    check(out.attentions[0].shape[1] == case.model.config.num_attention_heads, "config.num_attention_heads is another number")


@workflow(GROUP, "another implementation of attention", "Llama", graph=False)
def attention(case: Case) -> None:
    found = []
    for kind in ("eager", "sdpa"):
        case.model.set_attn_implementation(kind)
        found.append(case.run())
    same(*found, 1e-4)


@workflow(GROUP, "training steps with labels", "BERT, labels", "Llama, labels")
def labels(case: Case) -> None:
    train(case.model, case.inputs, torch.optim.AdamW(case.model.parameters(), lr=1e-3))


@workflow(GROUP, "labels that the example inputs did not have", "BERT", graph=False)
def new_labels(case: Case) -> None:
    train(case.model, case.inputs | {"labels": case.inputs["input_ids"]})


@workflow(GROUP, "gradient_checkpointing_enable", "Llama, labels", graph=False)
def checkpointing(case: Case) -> None:
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for enable in (False, True):
        if enable:
            case.model.gradient_checkpointing_enable()
        case.model.train().zero_grad()
        loss_of(call(case.model, fresh(case.inputs))).backward()
        found.append([p.grad.clone() for p in case.model.parameters() if p.grad is not None])
    same(*found, 1e-5)


@workflow(GROUP, "Trainer", "Llama, labels", graph=False, needs=["accelerate"])
def trainer(case: Case) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[0] for k, v in case.inputs.items() if isinstance(v, Tensor)} for _ in range(4)]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    made = Trainer(case.model, TrainingArguments(str(case.folder / "run"), save_steps=2, **options), train_dataset=rows)
    made.train()
    wanted = case.run(case.model.eval())
    load = f"import transformers; model = transformers.{type(case.model).__name__}.from_pretrained('run/checkpoint-2')"
    same(case.elsewhere(load), wanted, 1e-6)


@workflow(GROUP, "resize_token_embeddings", "GPT-2", graph=False)
def resized(case: Case) -> None:
    words = case.run()[0].shape[-1]
    wanted = case.run()[0]
    case.model.resize_token_embeddings(words + 7, mean_resizing=False)
    found = case.run()[0]
    check(found.shape[-1] == words + 7 == case.model.config.vocab_size, "the vocabulary has another size")
    same([found[..., :words]], [wanted], 1e-6)


@workflow(GROUP, "PEFT LoRA: train, merge", "Llama, labels", needs=["peft"])
def lora(case: Case) -> None:
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    before, asked = count_parameters(case.model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    wanted = case.run()
    if hasattr(case.model, "generate"):
        adapted = get_peft_model(case.model, asked)
    else:
        adapted = inject_adapter_in_model(asked, case.model)
    same(case.run(adapted), wanted, 1e-6)  # an adapter starts as nothing
    train(adapted, case.inputs)
    trained = case.run(adapted)
    check(not torch.equal(trained[-1], wanted[-1]), "the adapters change nothing")
    if hasattr(adapted, "merge_and_unload"):
        merged = adapted.merge_and_unload()
        check(count_parameters(merged) == before, "the merged model has another size")
        same(case.run(merged), trained, 1e-4)


@workflow(GROUP, "sentence-transformers: encode, save, load", "BERT, encoder", graph=False, needs=["sentence_transformers"])
def sentences(case: Case) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    case.model.save_pretrained(case.folder / "bert")
    tokenizer().save_pretrained(case.folder / "bert")
    part = Transformer(str(case.folder / "bert"))
    check(count_parameters(part) == count_parameters(case.model), "the loaded model has another size")
    model = SentenceTransformer(modules=[part, Pooling(part.get_word_embedding_dimension())], device="cpu")
    text = ["w3 w4 w5", "w9 w8"]
    wanted = model.encode(text)
    model.save(str(case.folder / "sentences"))
    again = SentenceTransformer(str(case.folder / "sentences"), device="cpu").encode(text)
    same([torch.from_numpy(again)], [torch.from_numpy(wanted)], 1e-6)


@workflow(GROUP, "pipeline", "BERT", graph=False)
def pipeline(case: Case) -> None:
    from transformers import pipeline as pipe

    found = pipe("fill-mask", model=case.model, tokenizer=tokenizer())("w3 w4 [MASK] w6", top_k=2)
    check(len(found) == 2 and all(0 < f["score"] < 1 for f in found), "it fills in nothing")


@workflow(GROUP, "a head of another task on the encoder", "BERT, encoder")
def head(case: Case) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = copy.deepcopy(case.model), nn.Linear(case.run()[0].shape[-1], 3)

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.head(self.encoder(**inputs)["last_hidden_state"][:, 0])

    model = Classifier()
    train(model, case.inputs)
    check(case.run(model)[0].shape == (2, 3), "it has another shape")


def tokenizer() -> Any:
    """Sixty words, written as w3."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(3, 60))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "cls_token": "w3", "sep_token": "w4"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=30, **special)
