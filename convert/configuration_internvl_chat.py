"""Configuration of an InternVL model folder for transformers, which has no class of this model type.

Copied into every model folder, so that optimum-intel opens it (with trust_remote_code=True) without the original repository's
code. Imports nothing of the project.
"""

from transformers import PretrainedConfig


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        # transformers checks rope_scaling against keys that this plain class lacks; the graph has the scaling built in
        self.llm_config = PretrainedConfig(**{key: value for key, value in (llm_config or {}).items() if key != "rope_scaling"})
