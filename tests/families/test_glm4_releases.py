"""GLM-4's later release, which shares a layout with the first."""

import jaxllm
from tests.families.test_published_dialects import GLM_4_9B_CHAT_HF, read


def test_glm_4_0414_is_told_by_its_architecture_or_its_model_type():
    config = GLM_4_9B_CHAT_HF | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
    assert read(config | {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}) == jaxllm.spec("glm-4-9b-0414")
    del config["architectures"]
    assert read(config | {"model_type": "glm4"}) == jaxllm.spec("glm-4-9b-0414")
