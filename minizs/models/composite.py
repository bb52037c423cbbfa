"""Models of several parts, such as text and images: the language model in them is used alone.

The configuration of such a model holds one for each part. `text_config` gives that of the language
model, and of an ordinary model its only one."""

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from minizs.models.gguf import forget_quantisation, read_once


def text_config(model: nn.Module):
    """The configuration of the language model that this model is, or that is a part of it."""
    return model.config.get_text_config(decoder=True)


def load_language_model(
    folder: str, gguf_file: str | None = None, **options
) -> tuple[PreTrainedModel, list[str]]:
    """The language model of a folder, of a GGUF file in it or of a hub name, and the names of the
    weights that it lacks there.

    `options` are those of `from_pretrained`. Raises what the library raises."""
    config = read_once(AutoConfig, folder, gguf_file)
    is_composite = config.get_text_config(decoder=True) is not config
    kind = AutoModelForCausalLM
    if is_composite and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = AutoModelForImageTextToText
    if gguf_file:
        options.update(gguf_file=gguf_file, config=config)
    model, info = kind.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    if gguf_file:
        forget_quantisation(model)
    if is_composite:
        model = language_model_of(model)
    return model, sorted(info["missing_keys"])


def language_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The language model in a composite: a model of its own where its family has a class for that,
    else the whole, of which the other parts do not learn."""
    config = text_config(model)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        alone = transplant(model, config)
        if alone is not None:
            return alone
    model.requires_grad_(False)
    for part in (model.get_decoder(), model.get_output_embeddings()):
        part.requires_grad_(True)
    return model


def transplant(model: PreTrainedModel, config) -> PreTrainedModel | None:
    """A causal language model of this configuration with the modules of the composite, or None if
    these are not all that it needs."""
    head = model.get_output_embeddings()
    embedding = model.get_decoder().get_input_embeddings()
    config.tie_word_embeddings = head.weight is embedding.weight
    with torch.device("meta"):  # takes no memory: its modules are replaced
        alone = AutoModelForCausalLM.from_config(config)
    bodies = [part for part in model.modules() if type(part) is type(alone.base_model)]
    if len(bodies) != 1 or bodies[0] is alone.base_model:
        return None
    setattr(alone, alone.base_model_prefix, bodies[0])
    alone.set_output_embeddings(head)
    alone.generation_config = model.generation_config
    alone.name_or_path = model.name_or_path
    is_whole = not any(weight.is_meta for weight in alone.parameters())
    return alone if is_whole else None
