"""Prune the base model of every kind that transformers knows, from its own configuration made small, without a hint.

    kinds.py                       all of them
    kinds.py --models bloom sam3 --redo

Nobody chose these models: a kind counts if its configuration, with widths and depths cut down by their usual names, builds a
model that takes ordinary inputs (tokens, images, sound). *unbuilt* are those that do not, for reasons of their own. Rows go to
`kinds.jsonl`, the table of what is not exact to `KINDS.md`. Half of everything is pruned, in single precision; *exact* is what
its verification says, at a second batch size too where the model takes one and the pruned program does not refuse it.
"""

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from models import randomise
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from torch import nn

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "kinds.jsonl", HERE / "KINDS.md"
RATIO, LARGEST = 0.5, 300_000_000  # parameters
WORDS = 1000
WIDTHS = {
    64: "hidden_size d_model dim embed_dim n_embd embedding_size moe_intermediate_size shared_expert_intermediate_size",
    128: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim n_inner max_position_embeddings"
    " n_positions",
    32: "q_lora_rank kv_lora_rank",
    16: "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts"
    " num_local_experts n_routed_experts",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers"
    " num_key_value_heads num_experts_per_tok n_group",
    1: "topk_group",
    WORDS: "vocab_size",
}
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
SMALL = {name: size for size, names in WIDTHS.items() for name in names.split()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", help="some kinds, instead of all")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one kind")
    arguments = options(parser, measure, argv, memory=0.5, prepare=imports)
    if arguments is None:
        return
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    jobs = [{"kind": kind} for kind in arguments.models or sorted(MODEL_MAPPING_NAMES)]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo, workers=arguments.workers)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE)


def imports(kind: str) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # read on import
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = MODEL_MAPPING_NAMES[kind]
    for name in [names] if isinstance(names, str) else names:
        with contextlib.suppress(ImportError, AttributeError):  # it is met again, by the one who builds it
            getattr(transformers, name)


def measure(kind: str) -> Row:
    """The row of one kind; an error is a row too."""
    warnings.simplefilter("ignore")
    row: Row = {"machine": machine()}
    try:
        model, inputs = built(kind)
    except Exception as error:
        return row | {"status": "unbuilt", "reason": one_line(error)}
    row |= {"params": sum(p.numel() for p in model.parameters()), "inputs": sorted(inputs)}
    try:
        start = time.perf_counter()
        pruned = fxprune.prune(model, RATIO, example_inputs=inputs, verify=True)
        row["seconds"] = round(time.perf_counter() - start, 2)
    except fxprune.PruneError as error:
        return row | {"status": "inexact" if "is not exact" in error.what else "refused", "reason": one_line(error)}
    except Exception as error:
        return row | {"status": "failed", "reason": one_line(error)}
    row |= {"params_after": sum(p.numel() for p in pruned.parameters()), "capture": str(pruned.meta["capture"])[:200]}
    found = pruned.verification
    return row | {"status": "exact", "reason": "", "error": float(found.error), "compared": list(found.compared)}


def built(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of a kind, as small as it gets, and inputs that it takes."""
    from transformers import CONFIG_MAPPING, AutoModel

    last: Exception = RuntimeError("no inputs")
    for how in ("small", "shallow", "related", "wide heads"):  # some kinds insist on relations between their widths
        torch.manual_seed(0)
        try:
            config = shrunk(CONFIG_MAPPING[kind](), how)
            with torch.device("meta"):
                count = sum(p.numel() for p in AutoModel.from_config(config).parameters())
            if count > LARGEST:
                raise RuntimeError(f"{count / 1e6:.0f} million parameters")
            model = AutoModel.from_config(config).eval()
        except Exception as error:
            last = error
            continue
        for inputs in candidates(model, config):
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception as error:
                last = error
                continue
            with torch.no_grad():
                randomise(model, inputs)
            return model, inputs
    raise last


def shrunk(config: Any, how: str) -> Any:
    """A configuration, and those inside of it, with small numbers in it and without a cache.

    Arguments:
        how: `small` numbers; `shallow`: a small number of layers alone; `related`: small numbers that follow from one another
            as they did; `wide heads`: these, and heads as wide as they were.
    """
    before, widths = dict(vars(config)), how != "shallow"
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrunk(value, how)
        elif type(value) is int and widths and value > SMALL.get(name, value):
            setattr(config, name, SMALL[name])
        elif type(value) is int and not widths and "layers" in name and value > 2:
            setattr(config, name, 2)
        elif type(value) is int and widths and name.endswith("_token_id") and value >= WORDS:
            setattr(config, name, 3)
        elif name == "use_cache":
            config.use_cache = False
    if widths and {"expand", "num_heads", "head_dim"} <= vars(config).keys():  # the heads of a state space share its width
        config.num_heads = config.expand * config.hidden_size // config.head_dim
    if how in ("related", "wide heads"):
        relate(config, before, wide=how == "wide heads")
    if vars(config).get("layer_types"):  # where it is a property, it follows from other numbers
        config.layer_types = list(config.layer_types)[: config.num_hidden_layers]
    return config


def relate(config: Any, before: dict[str, Any], wide: bool) -> None:
    """Have numbers of a configuration follow its heads again, as they did before they were made small.

    Arguments:
        before: the numbers then.
        wide: whether heads are as wide as then.
    """
    now = vars(config)
    heads = next((name for name in HEADS if type(now.get(name)) is int), None)
    if heads is not None and before.get("num_key_value_heads") == before[heads]:
        config.num_key_value_heads = now[heads]
    size, was = (head_size(numbers, heads) for numbers in (now, before))
    if wide and heads is not None and was and "hidden_size" in now and not now.get("head_dim"):
        config.hidden_size, size = was * now[heads], was
    if size and was and "rotary_dim" in now:
        config.rotary_dim = min(now["rotary_dim"], size)
    for held in (now, *(value for value in now.values() if isinstance(value, dict))) if size and was else ():
        for name, value in held.items():
            if str(name).endswith("section") and isinstance(value, list):
                ends = [round(sum(value[: i + 1]) * size / was) for i in range(len(value))]
                held[name] = [b - a for a, b in zip([0, *ends], ends)]
    if {"mamba_expand", "mamba_n_heads", "mamba_d_head", "hidden_size"} <= now.keys():
        config.mamba_d_head = now["mamba_expand"] * now["hidden_size"] // now["mamba_n_heads"]


def head_size(numbers: dict[str, Any], heads: str | None) -> int:
    """How wide a head is; 0 where that is not said."""
    width = next((numbers[name] for name in ("hidden_size", "n_embd") if type(numbers.get(name)) is int), 0)
    return int(numbers.get("head_dim") or (width // numbers[heads] if heads is not None else 0))


def candidates(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Inputs that a model might take, those that it names as its main ones first."""
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None) or 224
    height, width = (size[0], size[-1]) if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", None)
    image = torch.randn(1, channels if isinstance(channels, int) else 3, height, width)
    words, sound = torch.arange(4, 12).view(1, 8), torch.randn(1, 16000)
    spectra = [torch.randn(1, 80, 3000), torch.randn(1, 100, 80), torch.randn(1, 128, 3000)]
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main == "pixel_values":
        yield {"pixel_values": image}
        yield {"pixel_values": image, "input_ids": words}
        yield {"pixel_values": torch.randn(1, 8, 3, height, width)}
    elif main == "input_values":
        yield from ({"input_values": values} for values in (sound, sound[None], torch.randn(1, 1024, 128)))
    elif main == "input_features":
        yield from ({"input_features": features} for features in spectra)
        yield from ({"input_features": features, "decoder_input_ids": words} for features in spectra)
    yield {"input_ids": words}
    yield {"input_ids": words, "decoder_input_ids": words}
    yield {"input_ids": words, "pixel_values": image}
    yield {"pixel_values": image}
    yield {"pixel_values_videos": torch.randn(1, 8, 3, height, width)}
    yield {"input_values": sound}
    patch, frames = getattr(config, "patch_size", None), getattr(config, "temporal_patch_size", 1)
    if isinstance(patch, int) and isinstance(channels := getattr(config, "in_channels", channels), int):
        grid = torch.tensor([[1, 8, 8]])
        yield {"hidden_states": torch.randn(64, channels * frames * patch * patch), "grid_thw": grid}


def table(rows: list[Row]) -> str:
    made = [row for row in rows if row["status"] != "unbuilt"]
    counts = Counter(row["status"] for row in made)
    columns = [
        ("kind", "l", lambda row: row["kind"]),
        ("parameters, M", "r", lambda row: f"{row['params'] / 1e6:.1f}" if "params" in row else ""),
        ("status", "l", lambda row: row["status"]),
        ("why", "l", lambda row: row.get("reason", "")[:200]),
    ]
    names = Counter(row["machine"] for row in rows if "machine" in row)
    said = [s.partition(":")[0] for row in made for s in row.get("compared", ())]
    batches = Counter(s for s in said if s.startswith("another batch"))
    whole = sum("opaque: whole" in row.get("capture", "") for row in made)
    return (
        "# Every kind of transformers\n\nWritten by `kinds.py` from `kinds.jsonl`; what the words mean is said at its top.\n\n"
        f"- {len(rows)} kinds, {len(rows) - len(made)} unbuilt; of the other {len(made)}: "
        + ", ".join(f"{n} {status}" for status, n in counts.most_common())
        + f"\n- {whole} of them are captured as one node\n"
        + f"- a second batch: {batches['another batch']} are exact there too, {batches['another batch is refused']} refuse it, "
        + f"{counts['exact'] - batches.total()} originals do not take it\n"
        + "".join(f"- {n} rows on {name}\n" for name, n in names.most_common())
        + "\n"
        + markdown_table(columns, sorted((r for r in made if r["status"] != "exact"), key=lambda row: row["kind"]))
    )


if __name__ == "__main__":
    sys.exit(main())
