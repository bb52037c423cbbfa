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


def text_config(model: nn.Module):
    """The configuration of the language model that this model is, or that is a part of it."""
    return model.config.get_text_config(decoder=True)


def load_language_model(folder: str, **options) -> tuple[PreTrainedModel, list[str]]:
    """The language model of a folder or hub name, and the names of weights that it lacks there.

    `options` are those of `from_pretrained`. Raises what the library raises."""
    config = AutoConfig.from_pretrained(folder, **file_option(options), trust_remote_code=False)
    is_composite = config.get_text_config(decoder=True) is not config
    kind = AutoModelForCausalLM
    if is_composite and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = AutoModelForImageTextToText
    model, info = kind.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    if "gguf_file" in options:
        forget_quantisation(model)
    if is_composite:
        model = language_model_of(model)
    return model, sorted(info["missing_keys"])


def forget_quantisation(model: PreTrainedModel) -> None:
    """The weights of a GGUF file are ordinary ones once they are loaded. But `transformers` marks
    the model as quantised, and refuses to save such a model."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)


def file_option(options: dict) -> dict:
    return {name: options[name] for name in options if name == "gguf_file"}


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
    head, embedding = model.get_output_embeddings(), model.get_decoder().get_input_embeddings()
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
